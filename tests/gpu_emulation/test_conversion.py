"""cvt, mov and cvta against numpy and exact fractions."""

from fractions import Fraction

import numpy as np
import pytest

from tests.gpu_emulation.snippets import bfloat16_bits, bfloat16_values, evaluate
from tests.gpu_emulation.test_float import round_to

INTEGERS = ["u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64"]


def limits(kind):
    bits = int(kind[1:])
    return (0, 2**bits - 1) if kind[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def wrap(value, kind):
    low, high = limits(kind)
    return (value - low) % (high - low + 1) + low


def integers(kind):
    low, high = limits(kind)
    generator = np.random.default_rng(0)
    near = [0, 1, low, low + 1, high, high - 1, low // 2, high // 2]
    return [min(max(v, low), high) for v in near] + [
        wrap(int(v), kind) for v in generator.integers(0, 2**63, 56)
    ]


def as_array(kind, values):
    return np.array(values, f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")


@pytest.mark.parametrize("source", INTEGERS)
@pytest.mark.parametrize("result", INTEGERS)
def test_between_integers(gpu, result, source):
    values = integers(source)
    found = evaluate(gpu, f"cvt.{result}.{source} %d0, %a0;", [result], (source, as_array(source, values)))
    assert found.tolist() == [wrap(v, result) for v in values]
    low, high = limits(result)
    found = evaluate(
        gpu, f"cvt.sat.{result}.{source} %d0, %a0;", [result], (source, as_array(source, values))
    )
    assert found.tolist() == [min(max(v, low), high) for v in values]


@pytest.mark.parametrize("source", ["u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("result", ["f16", "f32", "f64"])
def test_integer_to_float(gpu, result, source):
    values = integers(source)
    found = evaluate(gpu, f"cvt.rn.{result}.{source} %d0, %a0;", [result], (source, as_array(source, values)))
    assert found.tolist() == [round_to(Fraction(v), result) for v in values]


def test_wide_register_gives_its_low_bits(gpu):
    x = np.array([0x1_8000_0001, 0xFFFF_FFFF_0000_0002, 7], np.uint64)
    body = "cvt.s64.s32 %d0, %a0; cvt.u64.u32 %d1, %a0; cvt.rn.f32.s32 %d2, %a0;"
    signed, unsigned, single = evaluate(gpu, body, ["b64", "b64", "f32"], ("b64", x))
    low = x.astype(np.uint32)
    assert (signed.view(np.int64) == low.view(np.int32)).all() and (unsigned == low).all()
    assert (single == low.view(np.int32).astype(np.float32)).all()


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_integer_to_float_with_directed_rounding(gpu, mode):
    values = integers("s64")
    found = evaluate(gpu, f"cvt.{mode}.f32.s64 %d0, %a0;", ["f32"], ("s64", as_array("s64", values)))
    assert found.tolist() == [round_to(Fraction(v), "f32", mode) for v in values]


FLOATS = np.array(
    [0.0, -0.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.7, -3.7, 1e10, -1e10, 1e20, -1e20, np.inf, -np.inf, 254.6]
)


@pytest.mark.parametrize(
    "mode, function", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
@pytest.mark.parametrize("result", ["s32", "u32", "s64", "u64", "u16", "s8"])
def test_float_to_integer(gpu, result, mode, function):
    low, high = limits(result)
    found = evaluate(gpu, f"cvt.{mode}.{result}.f64 %d0, %a0;", [result], ("f64", FLOATS))
    expected = [
        low if v == -np.inf else high if v == np.inf else min(max(int(v), low), high)
        for v in function(FLOATS)
    ]
    assert found.tolist() == expected


def test_flushed_float_to_integer(gpu):
    tiny = np.array([1e-40, 1e-30, 2.5], np.float32)
    assert evaluate(gpu, "cvt.rpi.ftz.s32.f32 %d0, %a0;", ["s32"], ("f32", tiny)).tolist() == [0, 1, 3]
    assert evaluate(gpu, "cvt.rpi.s32.f32 %d0, %a0;", ["s32"], ("f32", tiny)).tolist() == [1, 1, 3]


def test_nan_to_integer(gpu):
    nan = np.array([np.nan])
    assert evaluate(gpu, "cvt.rzi.s32.f32 %d0, %a0;", ["s32"], ("f32", nan)).tolist() == [0]
    assert evaluate(gpu, "cvt.rzi.u64.f32 %d0, %a0;", ["u64"], ("f32", nan)).tolist() == [2**63]
    for kind in ("s16", "s32", "s64"):
        expected = [limits(kind)[0]]
        assert evaluate(gpu, f"cvt.rzi.{kind}.f64 %d0, %a0;", [kind], ("f64", nan)).tolist() == expected
    assert evaluate(gpu, "cvt.rzi.u32.f64 %d0, %a0;", ["u32"], ("f64", nan)).tolist() == [2**31]


@pytest.mark.parametrize(
    "mode, function", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
def test_float_to_integral_float(gpu, mode, function):
    found = evaluate(gpu, f"cvt.{mode}.f32.f32 %d0, %a0;", ["f32"], ("f32", FLOATS))
    np.testing.assert_array_equal(found, function(FLOATS.astype(np.float32)))


def test_flushed_before_it_is_rounded_or_clamped(gpu):
    tiny = np.array([1e-40, -1e-40, 1e-30, 0.5, 2.0], np.float32)
    for name, expected in (
        ("rpi.ftz", [0, 0, 1, 1, 2]),
        ("rpi", [1, 0, 1, 1, 2]),
        ("rmi.ftz", [0, 0, 0, 0, 2]),
        ("rmi", [0, -1, 0, 0, 2]),
        ("ftz.sat", [0, 0, tiny[2], 0.5, 1]),
        ("sat", [tiny[0], 0, tiny[2], 0.5, 1]),
    ):
        found = evaluate(gpu, f"cvt.{name}.f32.f32 %d0, %a0;", ["f32"], ("f32", tiny))
        np.testing.assert_array_equal(found, np.array(expected, np.float32), name)


def halfway_values():
    generator = np.random.default_rng(1)
    x = generator.standard_normal(400) * 2.0 ** generator.integers(-12, 12, 400)
    x[::5] = np.float16(x[::5]).astype(np.float64) * (1 + 2.0**-11)
    x[1::5] = bfloat16_values(bfloat16_bits(x[1::5])).astype(np.float64) * (1 + 2.0**-8)
    return x.astype(np.float32)


@pytest.mark.parametrize("mode", ["rn", "rz"])
def test_float_to_half(gpu, mode):
    x = halfway_values()
    expected = [round_to(Fraction(float(v)), "f16", mode) for v in x]
    assert evaluate(gpu, f"cvt.{mode}.f16.f32 %d0, %a0;", ["f16"], ("f32", x)).tolist() == expected
    expected = [round_to(Fraction(float(v)), "bf16", mode) for v in x]
    found = evaluate(gpu, f"cvt.{mode}.bf16.f32 %d0, %a0;", ["b16"], ("f32", x))
    assert bfloat16_values(found).tolist() == expected
    body = f"cvt.{mode}.f16x2.f32 %d0, %a0, %a1; cvt.{mode}.bf16x2.f32 %d1, %a0, %a1;"
    halves, bfloats = evaluate(gpu, body, ["b32", "b32"], ("f32", x), ("f32", x[::-1]))
    assert bfloat16_values(bfloats >> 16).tolist() == expected  # the first source is the upper half
    assert bfloat16_values(bfloats & 0xFFFF).tolist() == expected[::-1]
    upper = (halves >> 16).astype(np.uint16).view(np.float16)
    assert upper.tolist() == [round_to(Fraction(float(v)), "f16", mode) for v in x]


def test_half_overflow_and_nan(gpu):
    x = np.array([65519.0, 65520.0, -1e30, np.nan, 1e-8], np.float32)
    found = evaluate(gpu, "cvt.rn.f16.f32 %d0, %a0;", ["f16"], ("f32", x))
    np.testing.assert_array_equal(found, [65504.0, np.inf, -np.inf, np.nan, 0.0])


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_double_to_float(gpu, mode):
    x = np.random.default_rng(2).standard_normal(300) * 1e3
    found = evaluate(gpu, f"cvt.{mode}.f32.f64 %d0, %a0;", ["f32"], ("f64", x))
    assert found.tolist() == [round_to(Fraction(v), "f32", mode) for v in x]


def test_double_to_half_rounds_once(gpu):
    x = np.array([1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-11, 1 + 3 * 2.0**-11 - 2.0**-40])
    found = evaluate(gpu, "cvt.rn.f16.f64 %d0, %a0;", ["f16"], ("f64", x))
    assert found.tolist() == [1 + 2.0**-10, 1.0, 1 + 2.0**-10]


def test_half_to_float(gpu):
    bits = np.arange(0, 2**16, 37, dtype=np.uint16)
    np.testing.assert_array_equal(
        evaluate(gpu, "cvt.f32.f16 %d0, %a0;", ["f32"], ("b16", bits)), bits.view(np.float16)
    )
    np.testing.assert_array_equal(
        evaluate(gpu, "cvt.f32.bf16 %d0, %a0;", ["f32"], ("b16", bits)), bfloat16_values(bits)
    )


def test_tf32(gpu):
    x = halfway_values()
    x[::3] = (x[::3].view(np.uint32) & 0xFFFFE000 | 0x1000).view(np.float32)  # ties
    found = evaluate(gpu, "cvt.rna.tf32.f32 %d0, %a0;", ["b32"], ("f32", x))
    assert (found == ((x.view(np.uint32) + 0x1000) & 0xFFFFE000)).all()


def test_saturation(gpu):
    x = np.array([-1.0, 0.25, 2.0, np.nan], np.float32)
    assert evaluate(gpu, "cvt.sat.f32.f32 %d0, %a0;", ["f32"], ("f32", x)).tolist() == [0.0, 0.25, 1.0, 0.0]


def test_packing_moves(gpu):
    a, b = np.arange(64, dtype=np.uint32) * 0x01234567, np.arange(64, dtype=np.uint32) ^ 0xDEADBEEF
    body = """
    .reg .b16 %h<4>;
    .reg .b64 %w;
    mov.b64 %w, {%a0, %a1};
    mov.u64 %d0, %w;
    mov.b64 {%t0, %d1}, %w;
    mov.b32 {%h0, %h1}, %a0;
    mov.b32 %d2, {%h1, %h0};
    mov.b64 {%h0, %h1, %h2, %h3}, %w;
    mov.b64 %d3, {%h3, %h2, %h1, %h0};
    """
    wide, high, swapped, reversed_ = evaluate(gpu, body, ["b64", "b32", "b32", "b64"], ("b32", a), ("b32", b))
    assert (wide == (a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32))).all()
    assert (high == b).all() and (swapped == (a >> 16 | a << 16)).all()
    assert (reversed_.view(np.uint16).reshape(-1, 4) == wide.view(np.uint16).reshape(-1, 4)[:, ::-1]).all()


def test_float_literals_take_the_type_of_the_instruction(gpu):
    body = "mov.f32 %d0, 0f3FC00000; mov.f64 %d1, 0d3FF8000000000000;"
    body += "add.f32 %d2, %d0, 1.5; mov.b32 %d3, 0f3FC00000;"
    single, double, literal, bits = evaluate(gpu, body, ["f32", "f64", "f32", "b32"])
    assert single[0] == 1.5 and double[0] == 1.5 and literal[0] == 3.0 and bits[0] == 0x3FC00000
