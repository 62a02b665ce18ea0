"""`distributed.gather_keys` and `gather_rows`, and what recipes make of them, with two processes over gloo."""

import os

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

import ssl_kernels
from ssl_kernels.adapters import _gather
from ssl_kernels.distributed import gather_keys, gather_rows
from ssl_kernels.nn import MoCoQueue
from ssl_kernels.recipes.ranks import Ranks, gathered, over_ranks
from ssl_kernels.recipes.views import Batch
from tests.helpers import random_rows, same_bits

WORLD = 2


def message_of(function, *arguments):
    """What it raises, as a ValueError."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return None


def with_a_gradient(rank):
    """A loss that has no form over ranks, of the gathered rows: every parameter's mean over the ranks is its own."""
    labels = torch.arange(9) % 3
    for cuts in ((0, 4, 9), (0, 9, 9)):
        own = slice(*cuts[rank : rank + 2])
        joined = random_rows(9, 4).double().requires_grad_()
        expected = ssl_kernels.triplet_loss(joined, labels, 0.4, mining="semi_hard")
        (wanted,) = torch.autograd.grad(expected, joined)
        mine = joined.detach()[own].requires_grad_()
        for check in (True, False):
            rows, everyones = gather_rows(mine, check=check), gather_rows(labels[own], check=check)
            assert same_bits(rows.detach(), joined.detach()) and same_bits(everyones, labels)
            loss = ssl_kernels.triplet_loss(rows, everyones, 0.4, mining="semi_hard")
            (found,) = torch.autograd.grad(loss, mine, create_graph=True)
            torch.testing.assert_close(found / WORLD, wanted[own], rtol=1e-10, atol=1e-12)
            with pytest.raises(RuntimeError, match="no second derivative"):
                found.sum().backward()
    (narrow,) = torch.autograd.grad((gather_rows(mine.bfloat16()) * 3).sum(), mine)
    assert (narrow == 3 * WORLD).all()

    for gather in (
        gather_rows,
        _gather.gather_rows,
    ):  # what it gets for a gradient is another tensor's as well
        own, beside = (
            random_rows(2, 4, seed=rank).requires_grad_(),
            random_rows(4, 4, seed=2).requires_grad_(),
        )
        loss = ((gather(own) + beside) * (rank + 1)).sum()
        found = torch.autograd.grad(loss, (own, beside))
        assert (found[0] == 3).all() and (found[1] == rank + 1).all()

    even = random_rows(3, 4, seed=rank).view(3, 2, 2).requires_grad_()
    compiled = torch.compile(gather_rows, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(even).detach(), gather_rows(even).detach())
    (gradient,) = torch.autograd.grad((compiled(even) * torch.arange(6.0).view(6, 1, 1)).sum(), even)
    assert torch.equal(gradient[:, 0, 0], WORLD * torch.arange(6.0).chunk(2)[rank])
    with pytest.raises(RuntimeError, match="gather_rows: rows must be equally many on every rank"):
        compiled(even[rank:])
    message = message_of(gather_rows, even if rank else even[0, 0, 0].detach())
    own = "gather_rows: rows must have shape (B, ...), got ()"
    assert message == (f"gather_rows: rank 0 refused its input: {own}" if rank else own)
    message = message_of(gather_rows, even.detach() if rank else even)
    assert message == (
        "gather_rows: requires_grad of rows must be the same on every rank, got true on rank 0, false on rank 1"
    )
    message = message_of(gather_rows, even[:, : 2 - rank])
    assert message == (
        "gather_rows: width of rows must be the same on every rank, got [2, 2] on rank 0, [1, 2] on rank 1"
    )


def in_a_recipe(rank):
    """What the ranks of a training tell each other."""
    ranks = Ranks(rank, WORLD)
    rows, labels = random_rows(8, 4), torch.arange(8) % 3
    own = ranks.own(Batch([rows], [rows * 2], labels))
    assert same_bits(own.views[0], rows[4 * rank : 4 * rank + 4])
    assert same_bits(own.crops[0], 2 * own.views[0]) and torch.equal(
        own.labels, labels[4 * rank : 4 * rank + 4]
    )
    assert ranks.mean(torch.tensor(1.0 + rank)) == 1.5
    for flags in ((False, False), (True, False), (False, True), (True, True)):
        assert ranks.any(flags[rank], "cpu") == any(flags)
    assert same_bits(gathered(own.views[0]), rows)
    loss = over_ranks(ssl_kernels.triplet_loss)(own.views[0], own.labels, mining="semi_hard")
    assert loss == ssl_kernels.triplet_loss(rows, labels, mining="semi_hard")


def work(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    everyones = [random_rows(3, 4, seed=seed) for seed in range(WORLD)]

    queue = MoCoQueue(8, 4)
    for _ in range(2):  # wraps
        gathered = gather_keys(everyones[rank].T.contiguous().T.requires_grad_(), queue)
        assert same_bits(gathered, torch.cat(everyones))
        assert not gathered.requires_grad
        queue.push_(gathered)
    states = [torch.empty_like(queue.storage) for _ in range(WORLD)]
    dist.all_gather(states, queue.storage)
    assert same_bits(*states)
    assert gather_keys(torch.empty(0, 4), queue).shape == (0, 4)

    uneven = MoCoQueue(8, 4).push_(random_rows(2 + rank, 4))
    message = message_of(gather_keys, everyones[rank], uneven)
    assert message == (
        "gather_keys: queue position must be the same on every rank, got 2 on rank 0, 3 on rank 1"
    )
    full = MoCoQueue(3, 4).push_(random_rows(3 - 3 * rank, 4))  # position 0 on both
    message = message_of(gather_keys, everyones[rank], full)
    assert message == (
        "gather_keys: queue fill count must be the same on every rank, got 3 on rank 0, 0 on rank 1"
    )
    message = message_of(gather_keys, everyones[rank], full if rank else None)
    assert message == "gather_keys: queue must be the same on every rank, got false on rank 0, true on rank 1"
    message = message_of(gather_keys, everyones[rank], MoCoQueue(8 + rank, 4))
    assert message == "gather_keys: queue size must be the same on every rank, got 8 on rank 0, 9 on rank 1"
    for check in (True, False):  # ranks may differ in their number of keys
        gathered = gather_keys(everyones[rank][rank:], check=check)
        assert same_bits(gathered, torch.cat([rows[r:] for r, rows in enumerate(everyones)]))
    message = message_of(gather_keys, everyones[rank] if rank else everyones[rank][0])
    own = "gather_keys: keys must have shape (B, D), got (4,)"
    assert message == (f"gather_keys: rank 0 refused its input: {own}" if rank else own)
    message = message_of(gather_keys, everyones[rank].to((torch.float32, torch.bfloat16)[rank]))
    assert message == (
        "gather_keys: dtype of keys must be the same on every rank, got float32 on rank 0, bfloat16 on rank 1"
    )
    assert same_bits(gather_keys(everyones[rank]), torch.cat(everyones))  # the group still works
    with_a_gradient(rank)
    in_a_recipe(rank)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's may still run, with which the process can abort as it ends


def test_two_processes(tmp_path):
    multiprocessing.spawn(work, (str(tmp_path / "rendezvous"),), nprocs=WORLD)


def test_a_recipe_of_one_process_gathers_nothing():
    rows = random_rows(4, 3)
    assert gathered(rows) is rows and Ranks().own(rows) is rows and Ranks().any(True, "cpu") is True


def test_without_a_process_group_it_says_so():
    for gather in (gather_keys, gather_rows):
        with pytest.raises(RuntimeError, match=rf"^{gather.__name__}: torch.distributed must be initialised"):
            gather(random_rows(2, 3))
