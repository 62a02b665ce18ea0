#!/usr/bin/env bash
# torch 2.14.1: a torch.autograd.Function that says ctx.set_materialize_grads(False) gets None for the gradient of an output
# that nobody used, in eager mode; under torch.compile, with every backend, it gets zeros. Expected the same None, or a
# refusal to trace. Where backward multiplies that gradient by something infinite, as masked logits are, the compiled
# gradient is NaN and the eager one right, without a warning.
#
# Seen: eager [2, 2, 2]; backends eager, aot_eager and inductor [nan, nan, nan].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.2.6
cat > "$folder/try.py" <<'PY'
import torch


class Two(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.set_materialize_grads(False)
        return 2 * x, 3 * x

    @staticmethod
    def backward(ctx, first, second):
        return 2 * first if second is None else 2 * first + second * torch.inf


def use_first(x):
    first, _ = Two.apply(x)
    return first.sum()


def gradient(function):
    x = torch.ones(3, requires_grad=True)
    function(x).backward()
    return x.grad


eager = gradient(use_first)
print("eager", eager)
assert eager.tolist() == [2, 2, 2]
for backend in ("eager", "aot_eager", "inductor"):
    torch.compiler.reset()
    compiled = gradient(torch.compile(use_first, backend=backend, fullgraph=True))
    print(backend, compiled)
    assert compiled.isnan().all(), "torch behaves differently now"
PY
"$folder/env/bin/python" "$folder/try.py"
