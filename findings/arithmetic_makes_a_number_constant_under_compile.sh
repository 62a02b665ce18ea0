#!/usr/bin/env bash
# torch 2.11.0, torch.compile: a Python float that changes from call to call is dynamic from the second value on, but only
# until it meets another Python number. `p * x` and comparisons take two graphs for any number of values; `(1 - p) * x`,
# `2 * p * x` and `x.shape[0] * p * x` take a graph for each value, and with fullgraph=True the ninth value raises
# FailOnRecompileLimitHit. A good guess is that all of these are dynamic or none. Backend "eager" shows none of it: the
# constant is made on the way to AOTAutograd. Multiplied by a 0-d tensor first, p stays dynamic. torch 2.14.1 keeps all of
# them dynamic.
#
# Seen, graphs for 12 values: torch 2.11.0 aot_eager 2 and 2, then an error three times, 2 with the tensor; eager 2
# everywhere. torch 2.14.1: 2 everywhere.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/try.py" <<'PY'
import sys

import torch
from torch._dynamo.testing import CompileCounterWithBackend

LOSSES = {
    "p * x": lambda x, p: (p * x).sum(),
    "x if p > 0": lambda x, p: (p * x).sum() if p > 0 else x.sum(),
    "(1 - p) * x": lambda x, p: ((1 - p) * x).sum(),
    "2 * p * x": lambda x, p: (2 * p * x).sum(),
    "rows * p * x": lambda x, p: (x.shape[0] * p * x).sum(),
    "(1 - p * one) * x": lambda x, p: ((1 - p * torch.ones(())) * x).sum(),
}


def graphs(loss, backend):
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    try:
        for k in range(12):
            x = torch.randn(5, 3, requires_grad=True)
            found, expected = compiled(x, 0.1 + 0.01 * k), loss(x, 0.1 + 0.01 * k)
            torch.testing.assert_close(found, expected)
            found.backward()
    except torch._dynamo.exc.FailOnRecompileLimitHit:
        return "an error"
    return counter.frame_count


for backend in ("eager", "aot_eager"):
    found = {name: graphs(loss, backend) for name, loss in LOSSES.items()}
    print(torch.__version__, backend, found)
    made = [] if backend == "eager" or sys.argv[1] == "right" else ["(1 - p) * x", "2 * p * x", "rows * p * x"]
    expected = {name: "an error" if name in made else 2 for name in LOSSES}
    assert found == expected, "torch behaves differently now"
PY
for version in "2.11.0 constant" "2.14.1 right"; do
  python3 -m venv --clear "$folder/env"
  "$folder/env/bin/pip" install --quiet --disable-pip-version-check "torch==${version% *}" numpy==2.2.6
  "$folder/env/bin/python" "$folder/try.py" "${version#* }" 2> "$folder/errors" || { cat "$folder/errors"; exit 1; }
done
