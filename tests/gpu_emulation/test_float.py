"""Floating-point arithmetic against exact fractions, functions against float64."""

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.gpu_emulation.snippets import bfloat16_bits, bfloat16_values, evaluate

# Bits of the fraction, smallest exponent of a normal number, largest finite value.
FORMATS = {
    "f16": (10, -14, 65504.0),
    "bf16": (7, -126, float.fromhex("0x1.fep127")),
    "f32": (23, -126, float(np.finfo(np.float32).max)),
    "f64": (52, -1022, float(np.finfo(np.float64).max)),
}


def round_to(value, kind, mode="rn"):
    """A Fraction rounded to a format, as float; overflow is infinite in mode rn."""
    fraction_bits, least_exponent, largest = FORMATS[kind]
    if value == 0:
        return 0.0
    magnitude = abs(value)
    exponent = max(magnitude.numerator.bit_length() - magnitude.denominator.bit_length(), least_exponent - 2)
    while Fraction(2) ** (exponent + 1) <= magnitude:
        exponent += 1
    while Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, least_exponent) - fraction_bits)
    scaled = value / unit
    rounding = {"rn": round, "rz": int, "rm": math.floor, "rp": math.ceil}[mode]  # round() ties to even
    result = rounding(scaled) * unit
    if abs(result) > Fraction(largest):
        return math.copysign(math.inf, result)
    return float(result)


def values(count, seed, kind, spread=8):
    """Numbers of a format over a range of exponents, some of them halfway between others."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal(count) * 2.0 ** generator.integers(-spread, spread, count)
    x[::7] = np.round(x[::7] * 8) / 8 + 1
    return np.array([round_to(Fraction(float(v)), kind) for v in x])


def to_bits(kind, x):
    """(PTX type to load, array) of values of a format."""
    if kind == "bf16":
        return "b16", bfloat16_bits(x)
    return kind, x


def from_bits(kind, x):
    return bfloat16_values(x).astype(np.float64) if kind == "bf16" else x.astype(np.float64)


def run(gpu, instruction, kind, *columns):
    registers = ", ".join(["%d0", *(f"%a{i}" for i in range(len(columns)))])
    result = "b16" if kind == "bf16" else kind
    found = evaluate(
        gpu, f"{instruction} {registers};", [result], *(to_bits(kind, column) for column in columns)
    )
    return from_bits(kind, found)


EXACT = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
}


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("name", EXACT)
def test_rounds_to_nearest(gpu, name, kind):
    if gpu.arch < 90 and kind == "bf16" and not gpu.emulated:
        pytest.skip("add, sub and mul of bf16 need sm_90")
    a, b = values(300, 0, kind), values(300, 1, kind)
    expected = [round_to(EXACT[name](Fraction(x), Fraction(y)), kind) for x, y in zip(a, b, strict=True)]
    assert run(gpu, f"{name}.rn.{kind}", kind, a, b).tolist() == expected


@pytest.mark.parametrize("kind", ["f16", "bf16", "f32", "f64"])
def test_fma_rounds_once(gpu, kind):
    a, b, c = (values(2000, seed, kind, spread=5 if kind == "f16" else 12) for seed in (2, 3, 4))
    # A third of the sums cancel: what is left is the rounding of the product.
    products = [round_to(Fraction(x) * Fraction(y), kind) for x, y in zip(a, b, strict=True)]
    c[::3] = -np.array(products[::3])
    expected = [
        round_to(Fraction(x) * Fraction(y) + Fraction(z), kind) for x, y, z in zip(a, b, c, strict=True)
    ]
    assert run(gpu, f"fma.rn.{kind}", kind, a, b, c).tolist() == expected


def test_fma_of_bf16_is_not_rounded_twice(gpu):
    # 1 + 2^-7 times 1 + 2^-1 lies halfway between two bfloat16; the tiny c decides.
    a, b, c = np.array([1 + 2**-7] * 2), np.array([1.5] * 2), np.array([2.0**-80, -(2.0**-80)])
    expected = [
        round_to(Fraction(x) * Fraction(y) + Fraction(z), "bf16") for x, y, z in zip(a, b, c, strict=True)
    ]
    assert expected[0] != expected[1]
    assert run(gpu, "fma.rn.bf16", "bf16", a, b, c).tolist() == expected


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_directed_rounding(gpu, mode, kind):
    a, b, c = (values(300, seed, kind) for seed in (5, 6, 7))
    for name, exact in EXACT.items():
        expected = [round_to(exact(Fraction(x), Fraction(y)), kind, mode) for x, y in zip(a, b, strict=True)]
        assert run(gpu, f"{name}.{mode}.{kind}", kind, a, b).tolist() == expected, name
    expected = [
        round_to(Fraction(x) * Fraction(y) + Fraction(z), kind, mode) for x, y, z in zip(a, b, c, strict=True)
    ]
    assert run(gpu, f"fma.{mode}.{kind}", kind, a, b, c).tolist() == expected
    expected = [round_to(Fraction(x) / Fraction(y), kind, mode) for x, y in zip(a, b, strict=True)]
    assert run(gpu, f"div.{mode}.{kind}", kind, a, b).tolist() == expected


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_division_and_roots(gpu, kind):
    a, b = values(300, 8, kind), np.abs(values(300, 9, kind))
    dtype = np.float32 if kind == "f32" else np.float64
    quotient = [round_to(Fraction(x) / Fraction(y), kind) for x, y in zip(a, b, strict=True)]
    assert run(gpu, f"div.rn.{kind}", kind, a, b).tolist() == quotient
    assert run(gpu, f"rcp.rn.{kind}", kind, b).tolist() == [round_to(1 / Fraction(y), kind) for y in b]
    assert (run(gpu, f"sqrt.rn.{kind}", kind, b) == np.sqrt(b.astype(dtype))).all()


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
def test_pairs(gpu, kind):
    half = kind[:-2]
    low, high, other = values(200, 10, half), values(200, 11, half), values(200, 12, half)

    def pack(lo, hi):
        bits = bfloat16_bits if half == "bf16" else lambda x: x.astype(np.float16).view(np.uint16)
        return bits(lo).astype(np.uint32) | bits(hi).astype(np.uint32) << 16

    def exact(a, b, c):
        return np.array(
            [round_to(Fraction(x) * Fraction(y) + Fraction(z), half) for x, y, z in zip(a, b, c, strict=True)]
        )

    operands = [("b32", pack(low, high)), ("b32", pack(other, other)), ("b32", pack(high, low))]
    found = evaluate(gpu, f"fma.rn.{kind} %d0, %a0, %a1, %a2;", ["b32"], *operands)
    assert (found == pack(exact(low, other, high), exact(high, other, low))).all()


def test_flush_to_zero_and_saturation(gpu):
    tiny = np.array([1e-39, -1e-39, 1.5e-38, 1e-20, 0.25, 3.0, -2.0, np.nan])
    one = np.ones(8)
    assert run(gpu, "mul.ftz.f32", "f32", tiny, one)[:2].tolist() == [0.0, 0.0]
    assert (run(gpu, "mul.f32", "f32", tiny, one)[:7] == tiny[:7].astype(np.float32)).all()
    assert run(gpu, "mul.ftz.f32", "f32", tiny[3:4], tiny[3:4]).tolist() == [0.0]
    assert run(gpu, "add.sat.f32", "f32", tiny, np.zeros(8))[4:].tolist() == [0.25, 1.0, 0.0, 0.0]


def test_min_max_of_nan_and_zeros(gpu):
    nan = np.nan
    a = np.array([1.0, nan, 2.0, nan, -0.0, 0.0, -np.inf])
    b = np.array([2.0, 3.0, nan, nan, 0.0, -0.0, np.inf])
    least, most = run(gpu, "min.f32", "f32", a, b), run(gpu, "max.f32", "f32", a, b)
    np.testing.assert_array_equal(least, [1, 3, 2, nan, 0, 0, -np.inf])
    np.testing.assert_array_equal(most, [2, 3, 2, nan, 0, 0, np.inf])
    assert np.signbit(least[4:6]).all() and not np.signbit(most[4:6]).any()
    assert np.isnan(run(gpu, "max.NaN.f32", "f32", a, b)[1:4]).all()


def test_signs(gpu):
    a, b = np.array([1.5, -2.0, 0.0, -np.inf]), np.array([-1.0, 1.0, -0.0, 2.0])
    assert run(gpu, "abs.f32", "f32", a).tolist() == np.abs(a).tolist()
    assert run(gpu, "neg.f64", "f64", a).tolist() == (-a).tolist()
    assert run(gpu, "copysign.f32", "f32", b, a).tolist() == np.copysign(a, b).tolist()


# Largest relative (rsqrt ... rcp) or absolute (sin, cos, lg2 near 1) error that the PTX ISA allows, section
# 9.7.3.
@pytest.mark.parametrize(
    "name, function, low, high, relative, absolute",
    [
        ("ex2", np.exp2, -120, 120, 2**-22, 0),
        ("lg2", np.log2, 1e-3, 1e6, 2**-22, 2**-22),
        ("rcp", lambda x: 1 / x, 1e-3, 1e3, 2**-23, 0),
        ("sqrt", np.sqrt, 1e-6, 1e6, 2**-23, 0),
        ("rsqrt", lambda x: 1 / np.sqrt(x), 1e-6, 1e6, 2**-22, 0),
        ("sin", np.sin, -3.14, 3.14, 0, 2**-20.5),
        ("cos", np.cos, -3.14, 3.14, 0, 2**-20.5),
        ("tanh", np.tanh, -5, 5, 2**-10.5, 0),
    ],
)
def test_approximations(gpu, name, function, low, high, relative, absolute):
    x = np.random.default_rng(0).uniform(low, high, 512).astype(np.float32)
    np.testing.assert_allclose(
        run(gpu, f"{name}.approx.f32", "f32", x), function(x.astype(np.float64)), rtol=relative, atol=absolute
    )


def test_ex2_of_extremes(gpu):
    x = np.array([-np.inf, -200, -127.5, 0, 127, 128, np.inf, np.nan])
    np.testing.assert_array_equal(
        run(gpu, "ex2.approx.ftz.f32", "f32", x), [0, 0, 0, 1, 2.0**127, np.inf, np.inf, np.nan]
    )
    assert run(gpu, "ex2.approx.f32", "f32", x)[2] > 0


def test_testp(gpu):
    x = np.array([1.0, np.inf, np.nan, 1e-40, 0.0])
    for name, expected in {
        "finite": [1, 0, 0, 1, 1],
        "infinite": [0, 1, 0, 0, 0],
        "number": [1, 1, 0, 1, 1],
        "notanumber": [0, 0, 1, 0, 0],
        "subnormal": [0, 0, 0, 1, 0],
    }.items():
        body = f"testp.{name}.f32 %p0, %a0; selp.u32 %d0, 1, 0, %p0;"
        assert evaluate(gpu, body, ["u32"], ("f32", x)).tolist() == expected, name
