#!/usr/bin/env bash
# torch 2.11.0: an autograd.Function whose forward returns the result of an in-place operator, as in
# `(2 * x).masked_fill_(x < 0, 0)`, has gradient 0 everywhere under torch.compile, also with backend "eager". The value is right, and
# without the underscore all is right. Expected an error or the eager gradient; training runs on and learns nothing. torch
# 2.14.1 is right.
#
# Seen: eager [2, 2, 0]; torch 2.11.0 compiled [0, 0, 0], without the underscore [2, 2, 0].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.11.0 numpy==2.2.6
cat > "$folder/try.py" <<'PY'
import torch


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (2 * x).masked_fill_(x < 0, 0)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return (2 * gradient).masked_fill(x < 0, 0)


class OutOfPlace(InPlace):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (2 * x).masked_fill(x < 0, 0)


def gradient(function, backend=None):
    torch.compiler.reset()

    def run(x):
        return function.apply(x).sum()

    x = torch.tensor([1.0, 2.0, -1.0], requires_grad=True)
    (torch.compile(run, backend=backend, fullgraph=True) if backend else run)(x).backward()
    return x.grad.tolist()


print(torch.__version__, "eager", gradient(InPlace))
assert gradient(InPlace) == gradient(OutOfPlace) == [2, 2, 0]
for backend in ("eager", "aot_eager"):
    found = gradient(InPlace, backend)
    print(backend, found, "out of place", gradient(OutOfPlace, backend))
    assert found == [0, 0, 0] and gradient(OutOfPlace, backend) == [2, 2, 0], "torch behaves differently now"
PY
"$folder/env/bin/python" "$folder/try.py"
