"""The classes that gather, in two processes: against the originals, and against one process with all rows."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only

from benchmarks.peers import Originals
from ssl_kernels import adapters
from tests.adapters.uses import largest_error
from tests.distributed import processes

WORLD, B, D = 2, 6, 8


def _rows(rank, world, *seeds):
    """For each seed, this rank's share of (world · B, D) unit rows, float64."""
    made = [
        torch.randn(WORLD * B, D, generator=torch.Generator().manual_seed(s), dtype=torch.float64)
        for s in seeds
    ]
    share = WORLD * B // world
    return [F.normalize(x, dim=1)[rank * share : (rank + 1) * share].requires_grad_() for x in made]


def _lightly(name, *arguments, **options):
    def run(space, rank, world):
        x, y = _rows(rank, world, 0, 1)
        loss = getattr(space, name)(*arguments, gather_distributed=world > 1, **options)
        return loss(x, y), [x, y]

    return run


def _weights(x, y):
    return (x - 2 * y).square().sum(1)


def _bank(space, rank, world):
    """Three steps; a ring of two whole batches, from which lightly loses no row."""
    torch.manual_seed(0)
    loss = space.NTXentLoss(0.3, (2 * WORLD * B, D), gather_distributed=True).double()
    leaves = [_rows(rank, world, 2 * step, 2 * step + 1) for step in range(3)]
    total = sum(loss(*pair) for pair in leaves)
    return total + loss.memory_bank.bank.sum() + loss.memory_bank.bank_ptr, [
        x for pair in leaves for x in pair
    ]


def _open_clip(name, bias=None, **options):
    def run(space, rank, world):
        x, y = _rows(rank, world, 0, 1)
        scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
        scalars = [scale] + ([torch.tensor(bias, dtype=torch.float64, requires_grad=True)] if bias else [])
        loss = getattr(space, name)(rank=rank, world_size=world, **options)
        return loss(x, y, *scalars), [x, y, *scalars]

    return run


def _coca(space, rank, world):
    x, y = _rows(rank, world, 0, 1)
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    loss = space.CoCaLoss(1.0, 2.0, local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
    logits = torch.randn(B, 2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return sum(loss(x, y, logits, torch.ones(B, 2).long(), scale)), [x, y, scale]


# (library, what it is): the use, and by which share the mean over processes has the gradient of the loss of all rows;
# None where its value is another.
USES = {
    ("lightly", "NTXentLoss"): (_lightly("NTXentLoss", 0.3), 1),
    ("lightly", "NTXentLoss with a bank"): (_bank, None),
    ("lightly", "DCLLoss"): (_lightly("DCLLoss", 0.3), 1),
    ("lightly", "DCLLoss with weight_fn"): (_lightly("DCLLoss", 0.3, _weights), 1),
    ("open_clip", "CoCaLoss"): (_coca, None),
    **{
        ("open_clip", f"ClipLoss, local_loss={local}, gather_with_grad={grad}"): (
            _open_clip("ClipLoss", local_loss=local, gather_with_grad=grad),
            # Without both, each process differentiates its rows of the whole loss, and the mean divides once more.
            1 if grad else None if local else 1 / WORLD,
        )
        for local in (False, True)
        for grad in (False, True)
    },
    **{
        ("open_clip", f"SigLipLoss, {way}"): (_open_clip("SigLipLoss", -2.0, dist_impl=way), 1)
        for way in ("bidir", "shift", "reduce", "gather")
    },
}


def _result(run, space, rank, world):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library
        value, leaves = run(space, rank, world)
        return [value.detach()], list(torch.autograd.grad(value, leaves))


def _after_two_steps(rank, world):
    """The bank's rows, of which each step stores those of all processes."""
    torch.manual_seed(0)
    loss = adapters.lightly.NTXentLoss(0.3, (3 * WORLD * B, D), gather_distributed=world > 1).double()
    losses = [loss(*_rows(rank, world, 2 * step, 2 * step + 1)).detach() for step in range(2)]
    return [loss.memory_bank.bank, loss.memory_bank.bank_ptr, torch.stack(losses)]


def _all(rank, world):
    """{use: (ours, theirs or None)} on this process."""
    found = {}
    for key, (run, _) in USES.items():
        ours = _result(run, getattr(adapters, key[0]), rank, world)
        try:
            space = Originals(key[0])
        except ImportError:
            found[key] = (ours, None)
            continue
        found[key] = (ours, _result(run, space, rank, world))
    found["bank"] = _after_two_steps(rank, world)
    found["weights"] = _result(_lightly("DCLWLoss", 0.3, 0.7), adapters.lightly, rank, world)[0][0]
    # A tensor is sent by a handle of its process, which is gone when it is read.
    return tree_map_only(torch.Tensor, torch.Tensor.numpy, found)


@pytest.fixture(scope="module")
def ranks():
    return tree_map_only(np.ndarray, torch.from_numpy, processes.run(WORLD, _all))


@pytest.mark.parametrize("key", USES, ids=[".".join(key) for key in USES])
def test_each_process_has_what_the_library_has(ranks, key):
    if ranks[0][key][1] is None:
        pytest.skip(f"{key[0]} is not installed (make test-peers installs all)")
    for found in ranks:
        assert largest_error(*found[key]) < 1e-9


@pytest.mark.parametrize("key", [key for key in USES if USES[key][1]], ids=lambda key: ".".join(key))
def test_the_mean_of_the_processes_is_the_loss_of_all_rows(ranks, key):
    run, share = USES[key]
    value, gradients = _result(run, getattr(adapters, key[0]), 0, 1)
    ours = [found[key][0] for found in ranks]
    torch.testing.assert_close(sum(one[0][0] for one in ours) / WORLD, value[0])
    for place, whole in enumerate(gradients):
        parts = [one[1][place] for one in ours]
        if whole.dim():
            whole = whole * share
        # Rows get the gradient of the sum over processes, which DDP divides; scalars are averaged.
        found = torch.cat(parts) / WORLD if whole.dim() else sum(parts) / WORLD
        torch.testing.assert_close(found, whole)


def test_a_bank_holds_the_rows_of_all_processes(ranks):
    """Those of the second view, made unit; and its losses' mean is that of one process."""
    (first, place, losses), others = ranks[0]["bank"], ranks[1]["bank"]
    assert torch.equal(first, others[0]) and place.tolist() == others[1].tolist() == [2 * WORLD * B]
    whole = [torch.cat([_rows(rank, WORLD, 2 * step + 1)[0] for rank in range(WORLD)]) for step in range(2)]
    torch.testing.assert_close(first[: 2 * WORLD * B], torch.cat(whole).detach())
    torch.testing.assert_close((losses + others[2]) / WORLD, _after_two_steps(0, 1)[2])


def test_a_captioner_over_processes_adds_its_caption_loss(ranks):
    """Twice the loss of its own rows against the texts of all, and the cross-entropy of its captions."""
    key = ("open_clip", "ClipLoss, local_loss=True, gather_with_grad=True")
    logits = torch.randn(B, 2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    caption = F.cross_entropy(logits.mT, torch.ones(B, 2).long(), ignore_index=0)
    for found in ranks:
        (clip,), by_clip = found[key][0]
        (both,), by_both = found["open_clip", "CoCaLoss"][0]
        torch.testing.assert_close(both, 2 * clip + caption)
        for mine, once in zip(by_both, by_clip, strict=True):
            torch.testing.assert_close(mine, 2 * once)


def test_dclws_weights_are_of_all_rows(ranks):
    whole = _result(_lightly("DCLWLoss", 0.3, 0.7), adapters.lightly, 0, 1)[0][0]
    torch.testing.assert_close(sum(found["weights"] for found in ranks) / WORLD, whole)
