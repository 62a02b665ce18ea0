#!/usr/bin/env bash
# torch 2.14.1, CPU: what `once_differentiable` marks is often left out of a second derivative without an error.
# - Of a scalar loss the incoming gradient is a plain 1, which requires no grad: the first gradient then has no graph, and a
#   penalty on it adds nothing to the second one, by torch.autograd.grad and by backward().
# - Where the incoming gradient has a graph, backward() raises, but torch.autograd.grad(..., x) does not: the node that
#   would raise leads to no input of the function, so that the engine never runs it.
# Expected: the error that the decorator promises. Our own Functions run their backward inside a Function of its own whose
# inputs are those of the first, which raises in all four.
#
# Seen, gradient of L + |dL/dx|^2 by x = [1, 2, 3]: L = sum x^2: [2, 4, 6] where [10, 20, 30] is right; L = (sum x^2)^2 by
# torch.autograd.grad: that of L alone, [56, 112, 168], by backward(): RuntimeError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.14.1 numpy==2.2.6
cat > "$folder/try.py" <<'PY'
import torch
from torch.autograd.function import once_differentiable


class SumOfSquares(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def penalised(loss_of, by_backward):
    x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    loss = loss_of(x)
    (slope,) = torch.autograd.grad(loss, x, create_graph=True)
    total = loss + slope.square().sum()
    if not by_backward:
        return torch.autograd.grad(total, x)[0].tolist()
    try:
        total.backward()
    except RuntimeError as error:
        return type(error).__name__
    return x.grad.tolist()


def squared(loss_of):
    return lambda x: loss_of(x).pow(2)


def plain(x):
    return x.square().sum()


marked = SumOfSquares.apply
found = {
    "right": penalised(plain, False),
    "marked, grad": penalised(marked, False),
    "marked, backward": penalised(marked, True),
    "squared, right": penalised(squared(plain), False),
    "squared, marked, grad": penalised(squared(marked), False),
    "squared, marked, backward": penalised(squared(marked), True),
}
print(torch.__version__, found)
assert found["right"] == [10.0, 20.0, 30.0]
assert found["marked, grad"] == found["marked, backward"] == [2.0, 4.0, 6.0], "torch behaves differently now"
assert found["squared, right"] != found["squared, marked, grad"] == [56.0, 112.0, 168.0], "torch behaves differently now"
assert found["squared, marked, backward"] == "RuntimeError", "torch behaves differently now"
PY
"$folder/env/bin/python" "$folder/try.py"
