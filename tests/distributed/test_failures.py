"""Ranks that disagree, refuse their input, or are gone: an error on every rank, in words, and never a hang."""

import datetime
import os
import time

import pytest
import torch
from torch import distributed as dist

from ssl_kernels import distributed
from ssl_kernels.distributed import checks, groups
from ssl_kernels.nn import MoCoQueue
from tests.distributed import processes
from tests.helpers import random_rows, same_bits


def message_of(function, *arguments, **options):
    """What it raises, as (type, words)."""
    try:
        function(*arguments, **options)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def disagreeing(rank, world):
    loss, x, y = distributed.nt_xent_loss, random_rows(3, 4), random_rows(3, 4, seed=1)
    wide = random_rows(3, 4 + rank)
    moco = distributed.moco_loss
    queue = MoCoQueue(8, 4).push_(random_rows(2 + rank, 4))
    found = [
        message_of(loss, wide, wide),
        message_of(
            loss,
            x.to((torch.float32, torch.bfloat16, torch.float64)[rank]),
            y.to((torch.float32, torch.bfloat16, torch.float64)[rank]),
        ),
        message_of(loss, x.clone().requires_grad_(rank == 1), y),
        message_of(loss, x, y, normalize=rank == 0),
        message_of(loss, x, y, 0.5 if rank else 0.1),
        message_of(loss, x, y, reduction=("mean", "sum", "mean")[rank]),
        message_of(loss, x, y, strategy=("gather", "ring", "ring")[rank]),
        message_of((loss, distributed.dcl_loss, loss)[rank], x, y),
        message_of(moco, x, y, queue),
        message_of(loss, x[:0], y[:0]),
        message_of(loss, x, y, rows_per_rank=[3, 3, 4]),
        message_of(moco, x, y, MoCoQueue(3, 4).push_(y[3 * (rank == 1) :])),
    ]
    if rank == 1:  # the others are told
        found.append(message_of(loss, x, y, temperature=-1.0))
    else:
        found.append(message_of(loss, x, y))
    # The group is as it was.
    together = distributed.nt_xent_loss(x, y, strategy="ring").detach()
    assert together.isfinite()
    assert len(queue) == 2 + rank
    return found


def test_ranks_that_disagree_are_named_on_every_rank():
    found = processes.run(3, disagreeing)
    begin = "nt_xent_loss: "
    words = [
        "width of z0 must be the same on every rank, got [4] on rank 0, [5] on rank 1, [6] on rank 2",
        "dtype of z0 must be the same on every rank, got float32 on rank 0, bfloat16 on rank 1, float64 on rank 2",
        "requires_grad of z0 must be the same on every rank, got false on ranks 0, 2, true on rank 1",
        "normalize must be the same on every rank, got true on rank 0, false on ranks 1, 2",
        "temperature must be the same on every rank, got 0.1 on rank 0, 0.5 on ranks 1, 2",
        "reduction must be the same on every rank, got mean on ranks 0, 2, sum on rank 1",
        "strategy must be the same on every rank, got gather on rank 0, ring on ranks 1, 2",
    ]
    for rank in range(3):
        assert found[rank][:7] == [("ValueError", begin + each) for each in words]
        kind, text = found[rank][7]
        assert kind == "ValueError"
        assert text.endswith(
            "function must be the same on every rank, got nt_xent_loss on ranks 0, 2, dcl_loss on rank 1"
        )
        assert found[rank][8] == (
            "ValueError",
            "moco_loss: queue position must be the same on every rank, got 2 on rank 0, 3 on rank 1, 4 on rank 2",
        )
        assert found[rank][9] == (
            "ValueError",
            "nt_xent_loss: at least one rank must have rows, got none on any",
        )
        assert "rows_per_rank must be what the ranks have, [3, 3, 3], got [3, 3, 4]" in found[rank][10][1]
        assert found[rank][11] == (
            "ValueError",
            "moco_loss: queue fill count must be the same on every rank, got 3 on ranks 0, 2, 0 on rank 1",
        )
    refused = "temperature must be finite and > 0, got -1.0"
    assert found[1][12] == ("ValueError", begin + refused)
    for rank in (0, 2):
        assert found[rank][12] == ("ValueError", f"{begin}rank 1 refused its input: {begin}{refused}")


SECONDS = 1


def without_one(rank, world, strategy, leaves):
    """Rank 1 leaves, or does not come: the others get an error, and what they have works on."""
    group = dist.new_group(timeout=datetime.timedelta(seconds=SECONDS))
    x = random_rows(3, 4).requires_grad_()
    y = random_rows(3, 4, seed=1)
    loss = distributed.nt_xent_loss(x, y, group=group, strategy=strategy)  # they have met
    queue = MoCoQueue(8, 4).push_(y)
    before = queue.storage.clone()
    dist.barrier()
    if rank == 1:
        if leaves:
            os._exit(1)
        time.sleep(3 * SECONDS)
        return None
    start = time.monotonic()
    errors = [
        message_of(loss.backward),
        message_of(distributed.clip_loss, x, y, 5.0, group=group, strategy=strategy, check=False),
        message_of(lambda: queue.push_(distributed.gather_keys(x, group=group))),
    ]
    seconds = time.monotonic() - start
    assert same_bits(queue.storage, before)
    assert torch.autograd.grad(x.square().sum(), x)[0].isfinite().all()
    return errors, seconds


@pytest.mark.parametrize("leaves", [False, True], ids=["stays away", "leaves"])
@pytest.mark.parametrize("strategy", ["gather", "ring"])
def test_a_rank_that_is_missing_is_an_error_within_the_timeout(strategy, leaves):
    found = processes.run(3, without_one, strategy, leaves, missing=(1,) if leaves else ())
    for rank in (0, 2):
        errors, seconds = found[rank]
        assert all(error is not None for error in errors), errors
        assert seconds < 60  # and not the half hour of a group's usual timeout


def test_without_a_process_group_every_loss_says_so():
    x = random_rows(2, 3)
    for name in ("nt_xent_loss", "clip_loss", "moco_loss"):
        with pytest.raises(RuntimeError, match=rf"^{name}: torch.distributed must be initialised"):
            getattr(distributed, name)(x, x)


def refusing(rank, world):
    x = random_rows(2, 3)
    loss = distributed.nt_xent_loss
    return [
        message_of(loss, x, x, group="world"),
        message_of(loss, x, x, strategy="tree"),
        message_of(loss, x, x, backend="reference"),
        message_of(loss, x, x.to("meta")),
        message_of(distributed.dcl_loss, x[: 1 - rank], x[: 1 - rank]),
        message_of(distributed.sup_con_loss, x, torch.zeros(2, 3 + rank, dtype=torch.int64)),
        message_of(distributed.sup_con_loss, x, None, positives=torch.ones(2, 3, dtype=torch.bool)),
        message_of(distributed.sup_con_loss, x, None, positives=torch.ones(2, dtype=torch.bool)),
        message_of(distributed.sup_con_loss, x, torch.zeros(2, dtype=torch.int64), unlabelled=0.5),
        message_of(distributed.triplet_loss, x, torch.arange(2), mining="semi_hard"),
        message_of(distributed.clip_loss, x, x[:1], 5.0, image_index=torch.tensor([2])),
        message_of(loss, x, x, rows_per_rank=2, check=False),
        message_of(loss, x, x, rows_per_rank=[3, -1], check=False),
        message_of(loss, x, x, rows_per_rank=[2, 2 + rank]),
        message_of(loss, x, x, strategy="tree" if rank else "ring"),
        too_long(rank, world),
        message_of(loss, x, x, backend="reference" if rank else None),
        message_of(loss, x, x, rows_per_rank=[2], check=False),
        message_of(loss, x, x, rows_per_rank=[2, 2, 2], check=False),
        message_of(distributed.moco_loss, x[:1], x[:1], symmetric=True),
        message_of(distributed.clip_loss, x, x, 5.0, ids=torch.arange(2), label_smoothing=0.1),
        message_of(distributed.info_nce_loss, x, x, x, symmetric=True),
        message_of(distributed.info_nce_loss, x[:0], x[:0], x, negative_mode="others"),
    ]


def too_long(rank, world):
    """More than a message holds is compared all the same, and what may differ comes along."""
    _, ranks = groups.ranks_of("f", None)
    facts = {"_own": rank, "options": "x" * 2000}
    everyones = checks.compare("f", dist.group.WORLD, ranks, facts)
    different = message_of(
        checks.compare, "f", dist.group.WORLD, ranks, {**facts, "options": f"{rank}" * 2000}
    )
    return [theirs["_own"] for theirs in everyones], different[1][:45]


def test_bad_arguments_in_words():
    for found in processes.run(2, refusing):
        assert found[0] == ("TypeError", "nt_xent_loss: group must be a process group or None, got str")
        assert found[1] == (
            "ValueError",
            'nt_xent_loss: strategy must be "gather", "ring" or None, got \'tree\'',
        )
        assert found[2][1].startswith(
            'nt_xent_loss: backend must be "native", "triton" or "chunked" over several'
        )
        assert found[3] == ("ValueError", "nt_xent_loss: z1 must be on cpu as z0 is, got meta")
        assert found[4][1] == "dcl_loss: the ranks must together have at least 2 rows of z0, got 1"
        assert found[5][1] == (
            "sup_con_loss: labels per row must be the same on every rank, got 3 on rank 0, 4 on rank 1"
        )
        assert found[6][1] == "sup_con_loss: positives must have 4 columns, the rows of all ranks, got 3"
        assert found[7][1].endswith("a column for each of all ranks', got shape (2,)")
        assert found[8] == ("TypeError", "sup_con_loss: unlabelled must be an integer or None, got 0.5")
        assert found[9][1].startswith('triplet_loss: mining must be "batch_hard" over several ranks')
        assert found[10][1] == "clip_loss: image_index must be in [0, 2), got 2"
        assert (
            found[11][1] == "nt_xent_loss: rows_per_rank must be a sequence of whole numbers or None, got 2"
        )
        assert found[12][1].endswith("the numbers of rows of 2 ranks, each at least 0, got [3, -1]")
        assert found[13][1].endswith("the same on every rank, got [2, 2] on rank 0, [2, 3] on rank 1")
        assert "strategy must be" in found[14][1]
        assert "backend must be" in found[16][1]
        assert found[15] == ([0, 1], "f: input must be the same on every rank, got ")
        assert found[17][1].endswith("the numbers of rows of 2 ranks, each at least 0, got [2]")
        assert found[18][1].endswith("the numbers of rows of 2 ranks, each at least 0, got [2, 2, 2]")
        assert found[19][1] == "moco_loss: query must have an even number of rows with symmetric, got 1"
        assert found[20][1] == "clip_loss: label_smoothing must be 0 with ids, got 0.1"
        assert found[21][1] == "info_nce_loss: symmetric must be False with negative_keys, got True"
        assert found[22][1].startswith('info_nce_loss: negative_mode must be "unpaired" or "paired"')
