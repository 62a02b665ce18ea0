"""Integer, logic and shift instructions against Python's integers."""

import numpy as np
import pytest

from tests.gpu_emulation.snippets import TYPES, evaluate

EDGES = [
    0,
    1,
    2,
    3,
    5,
    7,
    31,
    32,
    33,
    127,
    128,
    255,
    2**15 - 1,
    2**15,
    2**16 - 1,
    2**31 - 1,
    2**31,
    2**32 - 1,
]
EDGES += [2**63 - 1, 2**63, 2**64 - 1]


def wrap(value, kind):
    bits = int(kind[1:])
    value &= 2**bits - 1
    return value - 2**bits if kind[0] == "s" and value >> (bits - 1) else value


def operands(kinds, seed=0, count=400):
    """Random and extreme values of each kind, as Python integers."""
    generator = np.random.default_rng(seed)
    columns = []
    for kind in kinds:
        values = [int(generator.choice(EDGES)) for _ in range(count // 2)]
        values += [int(x) for x in generator.integers(0, 2**64, count // 2, np.uint64, endpoint=False)]
        generator.shuffle(values)
        columns.append([wrap(value, kind) for value in values])
    return columns


def check(gpu, instruction, result, kinds, reference):
    """`instruction` with {} for its registers equals reference(*integers) modulo the size of the result."""
    columns = operands(kinds)
    registers = ", ".join(["%d0", *(f"%a{i}" for i in range(len(kinds)))])
    inputs = [(kind, np.array(column, TYPES[kind][0])) for kind, column in zip(kinds, columns, strict=True)]
    found = evaluate(gpu, instruction.format(registers) + ";", [result], *inputs)
    expected = [wrap(int(reference(*row)), result) for row in zip(*columns, strict=True)]
    assert found.tolist() == expected


def truncated_quotient(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


ALL = ["u16", "s16", "u32", "s32", "u64", "s64"]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    "name, reference",
    [
        ("add", lambda a, b: a + b),
        ("sub", lambda a, b: a - b),
        ("mul.lo", lambda a, b: a * b),
        ("min", min),
        ("max", max),
    ],
)
def test_binary(gpu, name, reference, kind):
    check(gpu, f"{name}.{kind} {{}}", kind, [kind, kind], reference)


@pytest.mark.parametrize("kind", ALL)
def test_mul_hi(gpu, kind):
    bits = int(kind[1:])
    check(gpu, f"mul.hi.{kind} {{}}", kind, [kind, kind], lambda a, b: a * b >> bits)


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32"])
def test_mul_and_mad_wide(gpu, kind):
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    check(gpu, f"mul.wide.{kind} {{}}", wide, [kind, kind], lambda a, b: a * b)
    check(gpu, f"mad.wide.{kind} {{}}", wide, [kind, kind, wide], lambda a, b, c: a * b + c)


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_mad_and_sad(gpu, kind):
    bits = int(kind[1:])
    check(gpu, f"mad.lo.{kind} {{}}", kind, [kind] * 3, lambda a, b, c: a * b + c)
    check(gpu, f"mad.hi.{kind} {{}}", kind, [kind] * 3, lambda a, b, c: (a * b >> bits) + c)
    check(gpu, f"sad.{kind} {{}}", kind, [kind] * 3, lambda a, b, c: abs(a - b) + c)


@pytest.mark.parametrize("kind", ALL)
def test_div_and_rem(gpu, kind):
    # The ISA leaves division by zero open: divide by at least 1.
    positive = f"{{{{ .reg .b{kind[1:]} %z; max.{kind} %z, %a1, 1; "
    quotient = lambda a, b: truncated_quotient(a, max(b, 1))  # noqa: E731
    remainder = lambda a, b: a - quotient(a, b) * max(b, 1)  # noqa: E731
    check(gpu, positive + f"div.{kind} %d0, %a0, %z; }}}} //{{}}\n", kind, [kind, kind], quotient)
    check(gpu, positive + f"rem.{kind} %d0, %a0, %z; }}}} //{{}}\n", kind, [kind, kind], remainder)


@pytest.mark.parametrize("kind", ["s16", "s32", "s64"])
def test_abs_and_neg(gpu, kind):
    check(gpu, f"abs.{kind} {{}}", kind, [kind], abs)
    check(gpu, f"neg.{kind} {{}}", kind, [kind], lambda a: -a)


def test_saturating_add_and_sub(gpu):
    clamp = lambda x: min(max(x, -(2**31)), 2**31 - 1)  # noqa: E731
    check(gpu, "add.sat.s32 {}", "s32", ["s32", "s32"], lambda a, b: clamp(a + b))
    check(gpu, "sub.sat.s32 {}", "s32", ["s32", "s32"], lambda a, b: clamp(a - b))


def test_mul24(gpu):
    check(gpu, "mul24.lo.u32 {}", "u32", ["u32", "u32"], lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF))
    check(gpu, "mul24.lo.s32 {}", "s32", ["s32", "s32"], lambda a, b: wrap24(a) * wrap24(b))


def wrap24(a):
    a &= 0xFFFFFF
    return a - 2**24 if a >> 23 else a


def test_dp4a(gpu):
    def reference(a, b, c, signed):
        byte = lambda x, i: wrap(x >> 8 * i, "s8" if signed else "u8")  # noqa: E731
        return c + sum(byte(a, i) * byte(b, i) for i in range(4))

    check(gpu, "dp4a.u32.u32 {}", "u32", ["u32"] * 3, lambda a, b, c: reference(a, b, c, False))
    check(gpu, "dp4a.s32.s32 {}", "s32", ["s32"] * 3, lambda a, b, c: reference(a, b, c, True))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(gpu, bits):
    kind = f"u{bits}"
    check(gpu, f"and.b{bits} {{}}", kind, [kind, kind], lambda a, b: a & b)
    check(gpu, f"or.b{bits} {{}}", kind, [kind, kind], lambda a, b: a | b)
    check(gpu, f"xor.b{bits} {{}}", kind, [kind, kind], lambda a, b: a ^ b)
    check(gpu, f"not.b{bits} {{}}", kind, [kind], lambda a: ~a)
    check(gpu, f"cnot.b{bits} {{}}", kind, [kind], lambda a: a == 0)


@pytest.mark.parametrize("table", [0x00, 0x1A, 0x96, 0xE8, 0xCA, 0x81, 0xFF])
def test_lop3(gpu, table):
    def reference(a, b, c):
        index = lambda i: (a >> i & 1) << 2 | (b >> i & 1) << 1 | (c >> i & 1)  # noqa: E731
        return sum((table >> index(i) & 1) << i for i in range(32))

    check(gpu, f"lop3.b32 {{}}, {table}", "u32", ["u32"] * 3, reference)


@pytest.mark.parametrize("kind", ALL)
def test_shifts(gpu, kind):
    bits = int(kind[1:])
    check(gpu, f"shl.b{bits} {{}}", f"u{bits}", [f"u{bits}", "u32"], lambda a, b: a << b if b < bits else 0)
    check(gpu, f"shr.{kind} {{}}", kind, [kind, "u32"], lambda a, b: a >> min(b, 2 * bits))


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_funnel_shift(gpu, mode):
    amount = lambda c: c & 31 if mode == "wrap" else min(c, 32)  # noqa: E731
    left = lambda a, b, c: (b << 32 | a) << amount(c) >> 32  # noqa: E731
    check(gpu, f"shf.l.{mode}.b32 {{}}", "u32", ["u32"] * 3, left)
    check(gpu, f"shf.r.{mode}.b32 {{}}", "u32", ["u32"] * 3, lambda a, b, c: (b << 32 | a) >> amount(c))


@pytest.mark.parametrize("bits", [32, 64])
def test_counting_bits(gpu, bits):
    unsigned, signed = f"u{bits}", f"s{bits}"
    check(gpu, f"popc.b{bits} {{}}", "u32", [unsigned], lambda a: a.bit_count())
    check(gpu, f"clz.b{bits} {{}}", "u32", [unsigned], lambda a: bits - a.bit_length())
    check(gpu, f"bfind.{unsigned} {{}}", "u32", [unsigned], lambda a: a.bit_length() - 1)
    magnitude = lambda a: a if a >= 0 else ~a  # noqa: E731
    check(gpu, f"bfind.{signed} {{}}", "u32", [signed], lambda a: magnitude(a).bit_length() - 1)
    check(
        gpu,
        f"bfind.shiftamt.{unsigned} {{}}",
        "u32",
        [unsigned],
        lambda a: bits - a.bit_length() if a else -1,
    )
    check(gpu, f"brev.b{bits} {{}}", unsigned, [unsigned], lambda a: int(f"{a:0{bits}b}"[::-1], 2))


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(gpu, kind):
    bits = int(kind[1:])

    def extract(a, start, length):
        start, length = start & 255, length & 255
        if length == 0:
            return 0
        a &= 2**bits - 1
        sign = a >> min(start + length - 1, bits - 1) & 1 if kind[0] == "s" else 0
        pick = lambda i: a >> (start + i) & 1 if i < length and start + i < bits else sign  # noqa: E731
        return sum(pick(i) << i for i in range(bits))

    def insert(field, into, start, length):
        start, length = start & 255, length & 255
        mask = (2**length - 1) << start & (2**bits - 1)
        return into & ~mask | field << start & mask

    check(gpu, f"bfe.{kind} {{}}", kind, [kind, "u32", "u32"], extract)
    check(gpu, f"bfi.b{bits} {{}}", f"u{bits}", [f"u{bits}", f"u{bits}", "u32", "u32"], insert)


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
def test_bit_masks(gpu, mode):
    def reference(start, length):
        if mode == "wrap":
            start, length = start & 31, length & 31
        return ((2 ** min(length, 32) - 1) << start) & (2**32 - 1) if start < 32 else 0

    check(gpu, f"bmsk.{mode}.b32 {{}}", "u32", ["u32", "u32"], reference)


def test_prmt(gpu):
    def reference(a, b, selector):
        result = 0
        for i in range(4):
            nibble = selector >> 4 * i & 15
            byte = (b << 32 | a) >> 8 * (nibble & 7) & 255
            if nibble & 8:
                byte = 255 if byte & 128 else 0
            result |= byte << 8 * i
        return result

    check(gpu, "prmt.b32 {}", "u32", ["u32"] * 3, reference)


def test_immediates_and_special_registers(gpu):
    body = "mov.u32 %d0, %laneid; add.s32 %d0, %d0, -3; mov.u32 %d1, %tid.x;"
    body += "mov.u32 %d2, %ctaid.x; add.u32 %d3, %i, 0x10;"
    lane, thread, block, shifted = evaluate(gpu, body, ["s32", "u32", "u32", "u32"], ("u32", np.zeros(130)))
    i = np.arange(130)
    assert (
        (lane == i % 32 - 3).all()
        and (thread == i % 64).all()
        and (block == i // 64).all()
        and (shifted == i + 16).all()
    )
