"""The checks of this folder notice a mistake in every collective."""

import datetime
import queue

import pytest

from tests.distributed import cases, mutations, processes, test_queue
from tests.distributed.cases import Case
from tests.distributed.test_losses import check

CASES = [
    Case("nt_xent_loss", 2, (0.3,), views=2),
    Case("clip_loss", 2, (5.0,), ("row_weights",), options={"label_smoothing": 0.1}),
    Case("siglip_loss", 2, (5.0, -2.0)),
    Case("sup_con_loss", 1, (0.2,), ("labels",)),
    Case("moco_loss", 2, (0.2,), frozen=(1,)),
    Case("triplet_loss", 1, (0.4,), ("labels",)),
]
SPLITS = {4: ((2, 2, 2, 2), (3, 1, 2, 4)), 3: ((2, 3, 1), (3, 3, 3))}


def checks(rank, world, mutation):
    mutations.apply(mutation)
    mutations.slow_down(rank)
    if mutation is None or mutation.module not in (mutations.QUEUE, mutations.SHUFFLE):
        for case in CASES:
            for sizes in SPLITS[world]:
                expected = cases.plain(case, sum(sizes))
                for strategy in ("gather", "ring"):
                    check(case, rank, sizes, "mean", expected, strategy=strategy)
    if world == 3 and (mutation is None or mutation.module == mutations.QUEUE):
        test_queue.divided(rank, world, None)
    if world == 3 and (mutation is None or mutation.module == mutations.SHUFFLE):
        test_queue.shuffled(rank, world)


def run(mutation, world):
    processes.run(world, checks, mutation, timeout=30, group_timeout=datetime.timedelta(seconds=4))


@pytest.mark.slow  # each starts processes, which wait for each other where a transfer is missing
@pytest.mark.parametrize("mutation", mutations.MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mistake_is_noticed(mutation):
    # The first rank that fails ends the others. One that ends its process or waits for good is noticed as well.
    with pytest.raises((AssertionError, queue.Empty)):
        for world in (3,) if mutation.module in (mutations.QUEUE, mutations.SHUFFLE) else (4, 3):
            run(mutation, world)


@pytest.mark.slow
@pytest.mark.parametrize("world", [3, 4])
def test_without_one_nothing_is(world):
    run(None, world)
