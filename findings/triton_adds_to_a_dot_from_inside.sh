#!/usr/bin/env bash
# triton 3.8.0 and 3.6.0: `x + tl.dot(a, b)` and `x * s + tl.dot(a, b)` add nothing after the product. x becomes what the dot
# starts from, and each partial sum is rounded at the size of x, also with input_precision="ieee", which promises float32's
# own arithmetic. With x = 2**24 and sixteen products of 1, the source says 16777216 + 16, which float32 holds, and the
# compiled kernel gives 16777216. `x - tl.dot(a, -b)` is compiled as written and gives 16777232. A product that is used twice,
# and one of float8 on 9.0, is added as written too; "tf32x3" adds x last wherever it stands. The usual
# `x += tl.dot(a, b)` in a loop is hence one long chain of roundings in float16, TF32 and ieee, not a sum of the blocks' sums.
#
# No GPU is needed: the kernels are compiled to TTGIR and PTX, and the multiplications and additions of the PTX for "ieee"
# are carried out here in float32.
#
# Seen, additions and subtractions of tensors: x + dot and x * s + dot 0 in float16, TF32 and ieee, 1 in tf32x3 and float8;
# x - dot 1, in tf32x3 2 (one of them adds 0). Value in ieee: x + dot 16777216, x - dot 16777232.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/try.py" <<'PY'
import re
import struct

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def kernel(a, b, x, scale, result, CASE: tl.constexpr, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    start = tl.load(x + i)
    product = tl.dot(tl.load(a + i), tl.load(b + i), input_precision=PRECISION)
    if CASE == "x + dot":
        total = start + product
    elif CASE == "x * s + dot":
        total = start * tl.load(scale) + product
    elif CASE == "x - dot":
        total = start - product
    tl.store(result + i, total)


def compiled(case, dtype, precision, capability=80, block=64):
    types = {"a": f"*{dtype}", "b": f"*{dtype}", "x": "*fp32", "scale": "*fp32", "result": "*fp32"}
    constants = {"CASE": case, "PRECISION": precision, "BLOCK": block}
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm


def additions(ttgir):
    """Additions and subtractions of tensors, but for the two with which tf32x3 splits its operands."""
    return len(re.findall(r"arith\.(?:addf|subf)", ttgir)) - 2 * (len(re.findall(r"= tt\.dot ", ttgir)) == 3)


def float32(number):
    return struct.unpack("f", struct.pack("f", number))[0]


def value(ptx, product):
    """What a thread stores first, if every product of an element of a and one of b is `product` and x is 2**24."""
    start, values = float(2**24), {"0f00000000": 0.0}
    loaded = set(re.findall(r"ld\.global\.b32 \{ (%r\d+) \}", ptx))
    for line in ptx.splitlines():
        name, *operands = re.findall(r"%r\d+|0f\w{8}", line)[:4] or [None]
        if "fma.rn.f32" in line:
            assert operands[2] in values or operands[2] in loaded, line
            values[name] = float32(product + values.get(operands[2], start))
        elif "sub.f32" in line:
            assert operands[0] in loaded, line
            values[name] = float32(start - values[operands[1]])
        elif "st.global" in line:
            return values[re.search(r"\{ (%r\d+) \}", line)[1]]


KINDS = {
    "float16": ("fp16", "tf32", 80, [0, 0, 1]),
    "TF32": ("fp32", "tf32", 80, [0, 0, 1]),
    "ieee": ("fp32", "ieee", 80, [0, 0, 1]),
    "tf32x3": ("fp32", "tf32x3", 80, [1, 1, 2]),
    "float8": ("fp8e4nv", "tf32", 90, [1, 1, 1]),
}
for kind, (dtype, precision, capability, expected) in KINDS.items():
    cases = ("x + dot", "x * s + dot", "x - dot")
    found = [additions(compiled(case, dtype, precision, capability)["ttgir"]) for case in cases]
    shown = ", ".join(f"{case} {n}" for case, n in zip(cases, found, strict=True))
    print(f"{triton.__version__}, {kind}: {shown}")
    assert found == expected, "triton behaves differently now"

plus = value(compiled("x + dot", "fp32", "ieee", block=16)["ptx"], 1.0)
minus = value(compiled("x - dot", "fp32", "ieee", block=16)["ptx"], -1.0)
print(f"{triton.__version__}, ieee, 2**24 and sixteen products: x + dot {plus:.0f}, x - dot {minus:.0f}")
assert plus == 2**24 and minus == 2**24 + 16, "triton behaves differently now"
PY
for version in 3.8.0 3.6.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check triton==$version
  TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" "$folder/try.py"
  rm -rf "${folder:?}/$version"
done
