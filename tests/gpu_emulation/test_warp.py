"""Instructions between the lanes of a warp, and how lanes diverge and meet again."""

import numpy as np
import pytest

from tests.gpu_emulation import PtxError
from tests.gpu_emulation.snippets import evaluate, launch

X = np.random.default_rng(0).integers(0, 2**32, 64, np.uint64).astype(np.uint32)
LANE = np.arange(64) % 32
WARP = np.arange(64) // 32 * 32


def shuffle(mode, b, c):
    """Sources by the ISA's description, for a width that c encodes."""
    segment, clamp = c >> 8 & 31, c & 31
    most, least = (LANE & segment) | (clamp & ~segment), LANE & segment
    source = {"up": LANE - b, "down": LANE + b, "bfly": LANE ^ b, "idx": least | (b & ~segment)}[mode]
    inside = source >= most if mode == "up" else source <= most
    return np.where(inside, source, LANE), inside


@pytest.mark.parametrize("width", [32, 16, 8, 4])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shfl(gpu, mode, width):
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    for b in (0, 1, 3, 5, 16, 31):
        body = f"shfl.sync.{mode}.b32 %d0|%p0, %a0, {b}, {c}, -1; selp.u32 %d1, 1, 0, %p0;"
        found, inside = evaluate(gpu, body, ["b32", "u32"], ("b32", X))
        source, expected = shuffle(mode, b, c)
        assert (found == X[WARP + source]).all() and (inside == expected).all(), b


def test_shfl_in_tiles_with_their_own_masks(gpu):
    body = """
    and.b32 %t0, %i, 24;
    mov.u32 %t1, 255;
    shl.b32 %t1, %t1, %t0;
    shfl.sync.bfly.b32 %d0, %a0, 4, 6175, %t1;
    """
    assert (evaluate(gpu, body, ["b32"], ("b32", X)) == X[np.arange(64) ^ 4]).all()


def test_vote(gpu):
    condition = X % 3 == 0
    body = """
    setp.ne.u32 %p0, %a0, 0;
    vote.sync.ballot.b32 %d0, %p0, -1;
    vote.sync.any.pred %p1, !%p0, -1;
    vote.sync.all.pred %p2, %p0, -1;
    vote.sync.uni.pred %p3, %p2, -1;
    selp.u32 %d1, 1, 0, %p1;
    selp.u32 %d2, 1, 0, %p2;
    selp.u32 %d3, 1, 0, %p3;
    """
    condition[32:] = True
    ballot, any_not, every, uniform = evaluate(gpu, body, ["b32"] * 4, ("u32", condition))
    bits = [int((condition[w : w + 32] << np.arange(32)).sum()) for w in (0, 32)]
    assert (ballot == np.repeat(np.array(bits, np.uint64), 32)).all()
    assert (
        (any_not == np.repeat([1, 0], 32)).all() and (every == np.repeat([0, 1], 32)).all() and uniform.all()
    )


def test_redux(gpu):
    for kind, x in (("u32", X), ("s32", X.view(np.int32))):
        for name, function in (("add", np.sum), ("min", np.min), ("max", np.max)):
            found = evaluate(gpu, f"redux.sync.{name}.{kind} %d0, %a0, -1;", [kind], (kind, x))
            expected = [function(x[w : w + 32].astype(np.int64)) for w in (0, 32)]
            assert (found == np.repeat(np.array(expected).astype(x.dtype), 32)).all(), (kind, name)
    for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
        found = evaluate(gpu, f"redux.sync.{name}.b32 %d0, %a0, -1;", ["b32"], ("b32", X))
        assert (found == np.repeat([function.reduce(X[w : w + 32]) for w in (0, 32)], 32)).all(), name


def test_match(gpu):
    values = X % 4
    values[32:] = 7
    body = "match.any.sync.b32 %d0, %a0, -1; match.all.sync.b32 %d1|%p0, %a0, -1; selp.u32 %d2, 1, 0, %p0;"
    some, every, flag = evaluate(gpu, body, ["b32"] * 3, ("b32", values))
    expected = [int(((values[w : w + 32] == values[i]) << np.arange(32)).sum()) for i, w in enumerate(WARP)]
    assert some.tolist() == expected
    assert (every == np.repeat(np.array([0, 0xFFFFFFFF], np.uint32), 32)).all() and (
        flag == np.repeat([0, 1], 32)
    ).all()


def test_elect_and_activemask(gpu):
    if gpu.arch >= 90:
        body = "elect.sync %d0|%p0, -1; selp.u32 %d1, 1, 0, %p0;"
        leader, elected = evaluate(gpu, body, ["u32", "u32"], ("u32", X))
        assert (leader == leader[0]).all() and elected.sum() == 2
    body = "mov.u32 %d0, 0; setp.lt.u32 %p0, %laneid, 5;".replace("%laneid", "%t0").join(
        ["mov.u32 %t0, %laneid; ", ""]
    )
    found = evaluate(gpu, body + "@%p0 activemask.b32 %d0;", ["b32"], ("u32", X))
    if gpu.emulated:
        assert (found == np.where(LANE < 5, 31, 0)).all()


def test_special_masks(gpu):
    body = "mov.u32 %d0, %lanemask_lt; mov.u32 %d1, %lanemask_ge; mov.u32 %d2, %lanemask_eq;"
    below, from_here, equal = evaluate(gpu, body, ["b32"] * 3, ("u32", X))
    assert (
        (equal == 1 << LANE.astype(np.uint64)).all()
        and (below == equal - 1).all()
        and (from_here == ~below).all()
    )


def test_diverging_loops_meet_again(gpu):
    """Each lane loops as often as its number says; the shuffle behind needs all of them."""
    body = """
    mov.u32 %t0, %laneid;
    mov.u32 %t1, 0;
    LOOP:
    setp.eq.u32 %p0, %t0, 0;
    @%p0 bra OUT;
    add.u32 %t1, %t1, %t0;
    sub.u32 %t0, %t0, 1;
    bra LOOP;
    OUT:
    shfl.sync.bfly.b32 %d0, %t1, 1, 31, -1;
    """
    found = evaluate(gpu, body, ["u32"], ("u32", X))
    neighbour = LANE ^ 1
    assert (found == neighbour * (neighbour + 1) // 2).all()


def test_halves_of_a_warp_in_different_branches(gpu):
    """Each half shuffles among itself, with its own mask."""
    body = """
    mov.u32 %t0, %laneid;
    setp.lt.u32 %p0, %t0, 16;
    @%p0 bra LOW;
    shfl.sync.idx.b32 %d0, %a0, 20, 31, 0xffff0000;
    bra JOIN;
    LOW:
    shfl.sync.idx.b32 %d0, %a0, 3, 31, 0x0000ffff;
    JOIN:
    """
    found = evaluate(gpu, body, ["b32"], ("b32", X))
    assert (found == X[WARP + np.where(LANE < 16, 3, 20)]).all()


def test_collective_waits_for_lanes_that_come_later(gpu):
    """Lanes reach bar.warp.sync by two ways; those that come first wait."""
    body = """
    mov.u32 %t0, %laneid;
    setp.lt.u32 %p0, %t0, 7;
    @!%p0 bra MEET;
    mov.u32 %t1, 5;
    MEET:
    bar.warp.sync 0xffffffff;
    vote.sync.ballot.b32 %d0, %p0, -1;
    """
    assert (evaluate(gpu, body, ["b32"], ("b32", X)) == 127).all()


FAULTS = {
    "deadlock.*never arrive": "setp.lt.u32 %p0, %i, 7; @%p0 shfl.sync.idx.b32 %t0, %i, 0, 31, -1;",
    "not in its member mask": "shfl.sync.idx.b32 %t0, %i, 0, 31, 0xffff;",
    "reads from lane 9, which is not": "setp.lt.u32 %p0, %i, 8; @%p0 shfl.sync.idx.b32 %t0, %i, 9, 31, 255;",
    "names lanes that have exited": "setp.lt.u32 %p0, %i, 8; @%p0 ret; bar.warp.sync -1;",
}


@pytest.mark.parametrize("message", FAULTS)
def test_faults(gpu, message):
    if not gpu.emulated:
        pytest.skip("a card does not notice")
    with pytest.raises(PtxError, match=message):
        launch(gpu, [FAULTS[message]], [])
