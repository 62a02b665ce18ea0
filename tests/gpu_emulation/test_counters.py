"""Counters of a launch against counts on paper."""

import dataclasses

import numpy as np
import pytest

from tests.gpu_emulation import Counters
from tests.gpu_emulation.snippets import at, launch


@pytest.fixture(autouse=True)
def emulated(gpu):
    if not gpu.emulated:
        pytest.skip("a card has no counters to give")


def aligned_buffer(size):
    """Bytes that start at a multiple of 256, as a card's allocations do."""
    raw = np.zeros(size + 256, np.uint8)
    start = -raw.ctypes.data % 256
    return raw[start : start + size]


@pytest.mark.parametrize(
    "stride, width, sectors",
    [(4, 4, 4), (8, 4, 8), (32, 4, 32), (0, 4, 1), (16, 16, 16), (2, 2, 2), (128, 16, 32)],
)
def test_global_sectors(gpu, stride, width, sectors):
    memory = aligned_buffer(8192)
    vector = {2: "b16 %h", 4: "b32 %t0", 16: "v4.b32 {%t0, %t1, %t2, %t3}"}[width]
    kind, register = vector.split(" ", 1)
    lines = [
        ".reg .b16 %h;",
        "mov.b16 %h, 0;",
        *(f"mov.b32 %t{i}, 0;" for i in range(4)),
        *at("%b0", "%i", stride),
    ]
    counters = launch(gpu, [*lines, f"st.global.{kind} [%address], {register};"], [memory])
    assert (counters.global_store_requests, counters.global_store_sectors) == (1, sectors)
    assert counters.global_store_bytes == 32 * width and counters.global_load_requests == 0
    counters = launch(gpu, [*lines, f"ld.global.{kind} {register}, [%address];"], [memory])
    assert (counters.global_load_requests, counters.global_load_sectors) == (1, sectors)


def test_misaligned_rows_touch_one_sector_more(gpu):
    counters = launch(gpu, [*at("%b0", "%i", 4), "ld.global.b32 %t0, [%address+4];"], [aligned_buffer(256)])
    assert counters.global_load_sectors == 5


@pytest.mark.parametrize(
    "stride, width, wavefronts, ideal",
    [
        (4, 4, 1, 1),
        (8, 4, 2, 1),
        (128, 4, 32, 1),
        (132, 4, 1, 1),
        (0, 4, 1, 1),
        (8, 8, 2, 2),
        (16, 16, 4, 4),
        (128, 16, 32, 4),
        (144, 16, 4, 4),
    ],
)
def test_bank_conflicts(gpu, stride, width, wavefronts, ideal):
    vector = {4: "b32 %t1", 8: "v2.b32 {%t1, %t2}", 16: "v4.b32 {%t1, %t2, %t3, %t4}"}[width]
    kind, register = vector.split(" ", 1)
    lines = [
        ".shared .align 16 .b8 tile[8192];",
        "mov.u32 %t0, tile;",
        f"mad.lo.u32 %t0, %i, {stride}, %t0;",
        f"ld.shared.{kind} {register}, [%t0];",
    ]
    counters = launch(gpu, lines, [], uninitialized=False)
    assert (counters.shared_requests, counters.shared_wavefronts) == (1, wavefronts)
    assert counters.shared_wavefronts_ideal == ideal


def test_order_of_the_lanes_does_not_matter(gpu):
    """Lanes in pairs that want one word, the second halves of the pairs last: 16 words, 2 sectors."""
    lines = [
        ".shared .align 16 .b8 tile[128];",
        "and.b32 %t1, %i, 15;",
        "mov.u32 %t0, tile;",
        "mad.lo.u32 %t0, %t1, 4, %t0;",
        "ld.shared.b32 %t2, [%t0];",
        *at("%b0", "%t1", 4),
        "ld.global.b32 %t2, [%address];",
    ]
    counters = launch(gpu, lines, [aligned_buffer(128)], uninitialized=False)
    assert (counters.shared_wavefronts, counters.global_load_sectors) == (1, 2)


@pytest.mark.parametrize("row_bytes, wavefronts", [(128, 32), (144, 4)])
def test_ldmatrix_bank_conflicts(gpu, row_bytes, wavefronts):
    lines = [
        ".shared .align 16 .b8 tile[8192];",
        "mov.u32 %t0, tile;",
        f"mad.lo.u32 %t0, %i, {row_bytes}, %t0;",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%t1, %t2, %t3, %t4}, [%t0];",
    ]
    counters = launch(gpu, lines, [], uninitialized=False)
    assert (counters.shared_wavefronts, counters.shared_wavefronts_ideal) == (wavefronts, 4)


def test_instructions(gpu):
    lines = [
        ".reg .f32 %f;",
        "mov.f32 %f, 0f00000000;",
        "fma.rn.f32 %f, %f, %f, %f;",
        "setp.lt.u32 %p0, %i, 5;",
        "@%p0 fma.rn.f32 %f, %f, %f, %f;",
        "ex2.approx.ftz.f32 %f, %f;",
        "@%p0 rcp.approx.f32 %f, %f;",
        "div.approx.ftz.f32 %f, %f, %f;",
        "div.full.f32 %f, %f, %f;",
        "rcp.rn.f32 %f, %f;",
        "bar.sync 0;",
        "red.global.add.u32 [%b0], 1;",
    ]
    counters = launch(gpu, lines, [np.zeros(1, np.uint32)], threads=64)
    fixed = 6 + 2 + 1  # before and after the lines: see snippets.kernel and launch
    assert counters.instructions == 2 * (11 + fixed)
    assert counters.thread_instructions == 64 * (9 + fixed - 1) + 5 + 5
    assert counters.fma_flops == 2 * (64 + 5)
    assert counters.special_functions == 3 * 64 + 5
    assert counters.barriers == 2 and counters.atomics == 2 and counters.divergent_instructions == 0


def test_divergence(gpu):
    lines = [
        "setp.lt.u32 %p0, %i, 5;",
        "@%p0 bra OVER;",
        "mov.u32 %t0, 1;",
        "mov.u32 %t0, 2;",
        "OVER: mov.u32 %t0, 3;",
    ]
    assert launch(gpu, lines, []).divergent_instructions == 2


def test_plain_reads_of_atomics_are_reported(gpu):
    lines = ["red.global.add.u32 [%b0], 1;", "ld.global.u32 %t0, [%b0];"]
    (warning,) = launch(gpu, lines, [np.zeros(1, np.uint32)], threads=64).warnings
    assert warning.startswith("plain reads of argument 0 while other threads update it atomically")


def test_counters_add():
    a = Counters(instructions=3, mma=1, warnings=("x",))
    total = a + a
    assert total.instructions == 6 and total.mma == 2 and total.warnings == ("x", "x")
    assert dataclasses.asdict(total)["barriers"] == 0
