"""cp.async: sizes, zero filling, groups, and what must not happen before the wait."""

import numpy as np
import pytest

from tests.gpu_emulation import PtxError
from tests.gpu_emulation.snippets import at, launch

emulated_only = pytest.mark.usefixtures("emulated")
TILE = [".shared .align 16 .b8 tile[1024];", "mov.u32 %t0, tile;", "mad.lo.u32 %t0, %i, 16, %t0;"]
COMMIT, WAIT = "cp.async.commit_group;", "cp.async.wait_group {};"


@pytest.fixture
def emulated(gpu):
    if not gpu.emulated:
        pytest.skip("a card does not notice")


def copy_out(base, size):
    """The 16 bytes at [%t0] to base, words of it."""
    lines = at(base, "%i", 16)
    for word in range(size // 4):
        lines += [f"ld.shared.b32 %t9, [%t0+{4 * word}];", f"st.global.b32 [%address+{4 * word}], %t9;"]
    return lines


@pytest.mark.parametrize("mode, size", [("ca", 4), ("ca", 8), ("ca", 16), ("cg", 16)])
def test_sizes(gpu, mode, size):
    source, out = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    lines = [
        *TILE,
        *at("%b0", "%i", 16),
        f"cp.async.{mode}.shared.global.L2::128B [%t0], [%address], {size};",
    ]
    launch(gpu, [*lines, "cp.async.wait_all;", *copy_out("%b1", size)], [source, out])
    words = size // 4
    assert (out.reshape(32, 4)[:, :words] == source.reshape(32, 4)[:, :words]).all()
    assert (out.reshape(32, 4)[:, words:] == 0).all()


def test_short_source_is_filled_with_zeros(gpu):
    source, out = np.full(16 * 32, 7, np.uint8), np.full(16 * 32, 255, np.uint8)
    lines = [
        *TILE,
        *at("%b0", "%i", 16),
        "and.b32 %t1, %i, 15;",
        "cp.async.cg.shared.global [%t0], [%address], 16, %t1;",
    ]
    launch(gpu, [*lines, COMMIT, WAIT.format(0), *copy_out("%b1", 16)], [source, out])
    expected = [7 if byte < lane % 16 else 0 for lane in range(32) for byte in range(16)]
    assert out.tolist() == expected


def test_predicate_that_ignores_the_source(gpu):
    source, out = np.full(128, 7, np.uint32), np.full(128, 255, np.uint32)
    lines = [*TILE, *at("%b0", "%i", 16), "setp.gt.u32 %p0, %i, 9;"]
    lines += ["cp.async.cg.shared.global [%t0], [%address], 16, %p0;", COMMIT, WAIT.format(0)]
    launch(gpu, [*lines, *copy_out("%b1", 16)], [source, out])
    assert (out.reshape(32, 4) == np.where(np.arange(32) > 9, 0, 7)[:, None]).all()


@emulated_only
def test_short_source_at_the_end_of_a_buffer(gpu):
    """Only the bytes asked for are read: 4 of 16 lie in the buffer."""
    source, out = np.full(13, 7, np.uint32)[:13], np.zeros(16, np.uint32)
    lines = [*TILE, *at("%b0", "%i", 16), "setp.eq.u32 %p0, %i, 3;", "selp.u32 %t1, {last}, 16, %p0;"]
    lines += [
        "cp.async.cg.shared.global [%t0], [%address], 16, %t1;",
        COMMIT,
        WAIT.format(0),
        *copy_out("%b1", 16),
    ]
    source = np.frombuffer(np.full(64, 7, np.uint32).data, np.uint32)[:13]
    launch(gpu, [line.replace("{last}", "4") for line in lines], [source, out], threads=4)
    assert out.tolist() == [7] * 13 + [0] * 3
    with pytest.raises(PtxError, match="read out of bounds"):
        launch(gpu, [line.replace("{last}", "8") for line in lines], [source, out], threads=4)


GROUPS = [
    *TILE,
    *at("%b0", "%i", 16),
    "cp.async.ca.shared.global [%t0], [%address], 4;",
    COMMIT,
    "cp.async.ca.shared.global [%t0+4], [%address+4], 4;",
    COMMIT,
]


@emulated_only
def test_groups_complete_in_order(gpu):
    source = np.arange(128, dtype=np.uint32)
    end = [WAIT.format(0)]
    launch(gpu, [*GROUPS, WAIT.format(1), "ld.shared.b32 %t1, [%t0];", *end], [source])
    with pytest.raises(PtxError, match=r"read of shared memory with a cp.async still in flight, offset 4"):
        launch(gpu, [*GROUPS, WAIT.format(1), "ld.shared.b32 %t1, [%t0+4];", *end], [source])
    with pytest.raises(PtxError, match=r"read of shared memory with a cp.async still in flight, offset 0"):
        launch(gpu, [*GROUPS, WAIT.format(2), "ld.shared.b32 %t1, [%t0];", *end], [source])
    with pytest.raises(PtxError, match=r"write of shared memory with a cp.async still in flight"):
        launch(gpu, [*GROUPS, WAIT.format(1), "st.shared.b32 [%t0+4], %i;", *end], [source])


@emulated_only
def test_copies_that_nobody_waits_for(gpu):
    with pytest.raises(PtxError, match=r"exits with cp.async still in flight"):
        launch(gpu, [*GROUPS, WAIT.format(1)], [np.zeros(128, np.uint32)])


@emulated_only
def test_a_wait_is_not_a_barrier(gpu):
    """The bytes that another warp has copied are there only after a barrier."""
    read = [
        "xor.b32 %t2, %i, 32;",
        "mov.u32 %t3, tile;",
        "mad.lo.u32 %t2, %t2, 16, %t3;",
        "ld.shared.b32 %t1, [%t2];",
    ]
    source = np.zeros(256, np.uint32)
    launch(gpu, [*GROUPS, WAIT.format(0), "bar.sync 0;", *read], [source], threads=64)
    for seed in range(3):
        with pytest.raises(PtxError, match=r"data race on shared memory|uninitialised|in flight"):
            launch(gpu, [*GROUPS, WAIT.format(0), *read], [source], threads=64, seed=seed)
        with pytest.raises(PtxError, match=r"data race on shared memory|in flight"):
            launch(gpu, [*GROUPS, "bar.sync 0;", WAIT.format(0), *read], [source], threads=64, seed=seed)


@emulated_only
def test_misaligned_source(gpu):
    with pytest.raises(PtxError, match=r"misaligned source of cp.async"):
        launch(
            gpu, [*TILE, "cp.async.cg.shared.global [%t0], [%b0+4], 16;"], [np.zeros(8, np.uint32)], threads=1
        )
