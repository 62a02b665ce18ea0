"""The checks of this folder notice a mistake in every collective."""

import datetime
import queue

import pytest
import torch

from ssl_kernels import distributed
from tests.distributed import cases, mutations, processes, test_queue, test_traffic
from tests.distributed.cases import Case
from tests.distributed.test_losses import check, on_the_way, reduced
from tests.helpers import random_rows, same_bits

CASES = [
    Case("nt_xent_loss", 2, (0.3,), views=2),
    Case("info_nce_loss", 2, (0.2,)),
    Case("clip_loss", 2, (5.0,), ("row_weights",), options={"label_smoothing": 0.1}),
    Case("siglip_loss", 2, (5.0, -2.0)),
    Case("sup_con_loss", 1, (0.2,), ("labels",)),
    Case("sup_con_loss", 1, (0.2,), ("several",)),
    Case("sup_con_loss", 1, (0.2,), ("positives",)),
    Case("moco_loss", 2, (0.2,), frozen=(1,)),
    Case("moco_loss", 2, (0.2,), ("ids",), frozen=(1,)),
    Case("nt_xent_loss", 2, (0.3,), ("ids",), views=2),
    Case("triplet_loss", 1, (0.4,), ("labels",)),
]
SPLITS = {4: ((2, 2, 2, 2), (3, 1, 2, 4)), 3: ((2, 3, 1), (3, 3, 3))}


def compared(rank, world):
    for case in CASES:
        for sizes in SPLITS[world]:
            expected = cases.plain(case, sum(sizes))
            for strategy in ("gather", "ring"):
                check(case, rank, sizes, "mean", expected, strategy=strategy)


def divided(rank, world):
    test_queue.divided(rank, world, None)


def keys_gathered(rank, world):
    keys = [random_rows(1 + r, 3, seed=r) for r in range(world)]
    assert same_bits(distributed.gather_keys(keys[rank]), torch.cat(keys))
    rows, weights = keys[rank].requires_grad_(), random_rows(6, 3, seed=7 + rank)
    (gradient,) = torch.autograd.grad((distributed.gather_rows(rows) * weights).sum(), rows)
    everyones = sum(random_rows(6, 3, seed=7 + r) for r in range(world))
    torch.testing.assert_close(gradient, everyones.split((1, 2, 3))[rank])


def compiled(rank, world):
    """A compiled function raises where ranks have other numbers of rows than it was compiled for."""
    loss = torch.compile(distributed.nt_xent_loss, fullgraph=True, backend="aot_eager")
    rows = random_rows(2 + (rank == 1), 3)
    with pytest.raises(RuntimeError, match="rows_per_rank must be what the ranks have"):
        loss(rows, rows, strategy="gather")


def ring_of_one(rank, world):
    """Within the blocks that a ring of several holds."""
    assert test_traffic.peak(rank, world, 2048, 128, "ring") < 30e6


# What notices the mistakes in a module, and with how many processes; in all others the losses do, with 4 and 3.
NOTICED_BY = {
    mutations.QUEUE: {3: [divided]},
    mutations.SHUFFLE: {3: [test_queue.shuffled]},
    mutations.KEYS: {3: [keys_gathered]},
    mutations.CHECKS: {3: [compiled]},
    mutations.OVER: {1: [ring_of_one]},
    mutations.TRANSPORT: {3: [on_the_way, compared], 4: [compared]},
    mutations.GROUPS: {3: [reduced, compared, divided, test_queue.shuffled], 4: [compared]},
    mutations.PAIRS: {3: [compared, divided], 4: [compared]},
}
OTHERS = {4: [compared], 3: [compared]}


def checks(rank, world, mutation):
    mutations.apply(mutation)
    every = [NOTICED_BY.get(mutation.module, OTHERS)] if mutation else [*NOTICED_BY.values()]
    noticed = dict.fromkeys(each for of_module in every for each in of_module.get(world, []))
    if compiled in noticed:  # torch.compile traces no delays
        compiled(rank, world)
        del noticed[compiled]
    mutations.slow_down(rank)
    for each in noticed:
        each(rank, world)


def run(mutation, world):
    processes.run(world, checks, mutation, timeout=30, group_timeout=datetime.timedelta(seconds=4))


@pytest.mark.slow  # each starts processes, which wait for each other where a transfer is missing
@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mistake_is_noticed(mutation):
    # The first rank that fails ends the others. One that ends its process or waits for good is noticed as well.
    with pytest.raises((AssertionError, queue.Empty)):
        for world in NOTICED_BY.get(mutation.module, OTHERS):
            run(mutation, world)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3, 4])
def test_without_one_nothing_is(world):
    processes.run(world, checks, None)
