#!/usr/bin/env bash
# triton 3.8.0 and 3.6.0: tl.multiple_of on a kernel's own argument, as in `stride = tl.multiple_of(stride, 16)`, does nothing,
# without a word. The hint is written onto the operation that made the value, and an argument has none. Neither is it kept on
# the parameter of a function that the kernel calls, whatever is passed there, nor on `n + 0`, which is still the argument;
# tl.assume(n % 16 == 0) does not help either. Where the launch says nothing of n (do_not_specialize, or an n that 8 divides
# but 16 does not), float32 is then stored element by element behind the mask `i < n`. The same hint on a value that was
# loaded works, and `n = n // 16 * 16` does for an argument what the hint was to do.
#
# No GPU is needed: the kernels are compiled to PTX for compute capability 8.0.
#
# Seen, in stores of 16 elements by a thread: 4 of 4 elements if the launch knows that n is a multiple of 16, for the hint on
# a loaded value and for n // 16 * 16; 16 of one element without a hint and in every other case.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/try.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def hinted(n):
    return tl.multiple_of(n, 16)


@triton.jit
def copy(x, y, argument, sizes, CASE: tl.constexpr):
    if CASE == "argument" or CASE == "argument known to the launch":
        n = argument
    elif CASE == "multiple_of(argument)":
        n = tl.multiple_of(argument, 16)
    elif CASE == "multiple_of(argument + 0)":
        n = tl.multiple_of(argument + 0, 16)
    elif CASE == "assume(argument % 16 == 0)":
        tl.assume(argument % 16 == 0)
        n = argument
    elif CASE == "argument // 16 * 16":
        n = argument // 16 * 16
    elif CASE == "multiple_of(load)":
        n = tl.multiple_of(tl.load(sizes), 16)
    elif CASE == "multiple_of(load) in a function":
        n = hinted(tl.load(sizes))
    i = tl.program_id(0) * 2048 + tl.arange(0, 2048)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < n)


def stores(case):
    """Elements of each store of a thread."""
    known = [0, 1, 2] if case == "argument known to the launch" else [0, 1]
    types = {"x": "*fp32", "y": "*fp32", "argument": "i32", "sizes": "*i32", "CASE": "constexpr"}
    source = ASTSource(copy, types, {"CASE": case}, {(i,): [["tt.divisibility", 16]] for i in known})
    ptx = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 4}).asm["ptx"]
    return [int(width or 1) for width in re.findall(r"st\.global(?:\.v(\d))?\.b32", ptx)]


CASES = {
    "argument known to the launch": [4] * 4,
    "argument": [1] * 16,
    "multiple_of(argument)": [1] * 16,
    "multiple_of(argument + 0)": [1] * 16,
    "assume(argument % 16 == 0)": [1] * 16,
    "argument // 16 * 16": [4] * 4,
    "multiple_of(load)": [4] * 4,
    "multiple_of(load) in a function": [1] * 16,
}
for case, expected in CASES.items():
    found = stores(case)
    print(f"{triton.__version__}, {case}: {len(found)} stores of {found[0]}")
    assert found == expected, "triton behaves differently now"
PY
for version in 3.8.0 3.6.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check triton==$version
  TRITON_CACHE_DIR="$folder/cache" "$folder/$version/bin/python" "$folder/try.py"
  rm -rf "${folder:?}/$version"
done
