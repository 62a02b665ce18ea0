"""Schedules differ by seed and repeat exactly."""

import itertools

import numpy as np
import pytest

from tests.gpu_emulation.snippets import at, launch


@pytest.fixture
def order(gpu):
    if not gpu.emulated:
        pytest.skip("the card has its own schedule")

    def run(seed):
        """Number of the warp that took each ticket, each warp taking 8."""
        log, ticket = np.zeros(4 * 4 * 8, np.uint32), np.zeros(1, np.uint32)
        lines = [
            "and.b32 %t0, %i, 31;",
            "setp.ne.u32 %p0, %t0, 0;",
            "@%p0 bra DONE;",
            "shr.u32 %t1, %i, 5;",
            "mov.u32 %t2, 0;",
            "LOOP:",
            "atom.global.add.u32 %t3, [%b1], 1;",
            *at("%b0", "%t3", 4),
            "st.global.u32 [%address], %t1;",
            "add.u32 %t2, %t2, 1;",
            "setp.lt.u32 %p1, %t2, 8;",
            "@%p1 bra LOOP;",
        ]
        launch(gpu, lines, [log, ticket], threads=128, grid=4, seed=seed)
        return log.tolist()

    return run


def test_seed_zero_runs_in_order(order):
    assert order(0) == [warp for warp in range(16) for _ in range(8)]


def test_seeds_differ_and_repeat(order):
    schedules = [order(seed) for seed in (0, 1, 2, 3)]
    assert all(a != b for i, a in enumerate(schedules) for b in schedules[:i])
    assert [order(seed) for seed in (0, 1, 2, 3)] == schedules
    for schedule in schedules:
        assert sorted(schedule) == sorted(schedules[0])


def test_blocks_and_warps_are_mixed(order):
    schedule = order(1)
    blocks = [warp // 4 for warp in schedule]
    assert blocks != sorted(blocks)
    first_block = schedule[:32]
    assert any(a > b for a, b in itertools.pairwise(first_block))
