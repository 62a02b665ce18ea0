"""setp, set, selp, slct, logic of predicates and guards."""

import numpy as np
import pytest

from tests.gpu_emulation.snippets import bfloat16_bits, evaluate

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.5, np.inf, -np.inf, np.nan]
A, B = (np.array(column) for column in zip(*((a, b) for a in SPECIAL for b in SPECIAL), strict=True))
ORDERED = ~(np.isnan(A) | np.isnan(B))
RELATIONS = {
    "eq": ORDERED & (A == B),
    "ne": ORDERED & (A != B),
    "lt": A < B,
    "le": A <= B,
    "gt": A > B,
    "ge": A >= B,
    "equ": ~ORDERED | (A == B),
    "neu": ~ORDERED | (A != B),
    "ltu": ~ORDERED | (A < B),
    "leu": ~ORDERED | (A <= B),
    "gtu": ~ORDERED | (A > B),
    "geu": ~ORDERED | (A >= B),
    "num": ORDERED,
    "nan": ~ORDERED,
}


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("relation", RELATIONS)
def test_setp_of_floats(gpu, relation, kind):
    inputs = [("b16", bfloat16_bits(x)) if kind == "bf16" else (kind, x) for x in (A, B)]
    body = f"setp.{relation}.{kind} %p0|%p1, %a0, %a1; selp.u32 %d0, 1, 0, %p0; selp.u32 %d1, 1, 0, %p1;"
    yes, no = evaluate(gpu, body, ["u32", "u32"], *inputs)
    assert (yes == RELATIONS[relation]).all() and (no == ~RELATIONS[relation]).all()


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_setp_of_integers(gpu, kind):
    bits = int(kind[1:])
    dtype = f"{'i' if kind[0] == 's' else 'u'}{bits // 8}"
    edge = (
        np.array([0, 1, 2, 2 ** (bits - 1) - 1, 2 ** (bits - 1), 2**bits - 1], np.uint64)
        .astype(f"u{bits // 8}")
        .view(dtype)
    )
    a, b = np.repeat(edge, len(edge)), np.tile(edge, len(edge))
    expected = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    if kind[0] == "u":
        expected |= {"lo": a < b, "ls": a <= b, "hi": a > b, "hs": a >= b}
    for relation, holds in expected.items():
        body = f"setp.{relation}.{kind} %p0, %a0, %a1; selp.u32 %d0, 1, 0, %p0;"
        assert (evaluate(gpu, body, ["u32"], (kind, a), (kind, b)) == holds).all(), relation


def test_setp_combines_with_a_predicate(gpu):
    a, b, c = (np.random.default_rng(seed).integers(0, 3, 256) for seed in range(3))
    for name, combine in {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.items():
        body = f"""
        setp.ne.u32 %p2, %a2, 0;
        setp.lt.{name}.u32 %p0|%p1, %a0, %a1, !%p2;
        selp.u32 %d0, 1, 0, %p0;
        selp.u32 %d1, 1, 0, %p1;
        """
        yes, no = evaluate(gpu, body, ["u32", "u32"], ("u32", a), ("u32", b), ("u32", c))
        assert (yes == combine(a < b, c == 0)).all() and (no == combine(a >= b, c == 0)).all(), name


def test_setp_of_pairs(gpu):
    low, high = (
        A.astype(np.float16).view(np.uint16).astype(np.uint32),
        B.astype(np.float16).view(np.uint16).astype(np.uint32),
    )
    body = "setp.lt.f16x2 %p0|%p1, %a0, %a1; selp.u32 %d0, 1, 0, %p0; selp.u32 %d1, 1, 0, %p1;"
    first, second = evaluate(gpu, body, ["u32", "u32"], ("b32", low | high << 16), ("b32", high | low << 16))
    assert (first == (A < B)).all() and (second == (B < A)).all()


def test_set(gpu):
    body = "set.lt.u32.f32 %d0, %a0, %a1; set.geu.f32.f32 %d1, %a0, %a1;"
    ones, floats = evaluate(gpu, body, ["u32", "f32"], ("f32", A), ("f32", B))
    assert (ones == np.where(A < B, 0xFFFFFFFF, 0)).all()
    assert (floats == RELATIONS["geu"]).all()


def test_slct(gpu):
    a, b, c = np.arange(8), np.arange(8) + 100, np.array([-2, -1, 0, 1, 2, -(2**31), 2**31 - 1, 5])
    found = evaluate(gpu, "slct.u32.s32 %d0, %a0, %a1, %a2;", ["u32"], ("u32", a), ("u32", b), ("s32", c))
    assert (found == np.where(c >= 0, a, b)).all()


def test_logic_of_predicates(gpu):
    a, b = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    body = """
    setp.ne.u32 %p0, %a0, 0;
    setp.ne.u32 %p1, %a1, 0;
    and.pred %p2, %p0, %p1;
    or.pred %p3, %p0, %p1;
    xor.pred %p4, %p0, %p1;
    not.pred %p5, %p0;
    mov.pred %p6, %p1;
    selp.u32 %d0, 1, 0, %p2;
    @%p3 add.u32 %d0, %d0, 2;
    @%p4 add.u32 %d0, %d0, 4;
    @%p5 add.u32 %d0, %d0, 8;
    @!%p6 add.u32 %d0, %d0, 16;
    """
    found = evaluate(gpu, body, ["u32"], ("u32", a), ("u32", b))
    assert found.tolist() == [8 + 16, 2 + 4 + 8, 2 + 4 + 16, 1 + 2]
