#!/usr/bin/env bash
# torch 2.14.1 and 2.11.0, CPU, torch.compile with its default backend: a silently wrong gradient. An autograd.Function returns a
# matrix's diagonal (cloned) and sums over the matrix, and saves the matrix. Its backward makes a new matrix from the saved one,
# element by element, and writes a diagonal of its own into it, by new.diagonal().copy_(...). Nothing that was saved is written
# to. What of the result's derivative depends on the diagonal (a hinge of the variance, as in VICReg) is not kept but read
# again, from a view of the saved matrix, and inductor puts the new matrix into the saved one's memory before that view is
# read. Eager mode, plain autograd without a Function, and the compiled graph run without inductor agree to the last digits.
#
# Seen, largest difference from the eager gradient, and its largest element: rows of 7 x 5: 0.16 of 1.4; 256 x 64: 0.019 of
# 0.0062, three times the gradient itself. With matrix[places, places] in place of matrix.diagonal().clone(): 1e-7 or less.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/try.py" <<'PY'
import torch


def diagonal_as_a_view(matrix):
    return matrix.diagonal().clone()


def diagonal_by_index(matrix):
    places = torch.arange(matrix.shape[0])
    return matrix[places, places]


def loss_with(diagonal_of):
    class Moments(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            centred = z - z.mean(0)
            covariance = centred.T @ centred / (z.shape[0] - 1)
            variance = diagonal_of(covariance)
            ctx.save_for_backward(centred, covariance)
            return variance, covariance.square().sum(1) - variance.square()

        @staticmethod
        def backward(ctx, grad_variance, grad_off):
            centred, covariance = ctx.saved_tensors
            by_covariance = 2 * (grad_off[:, None] + grad_off) * covariance
            by_covariance.diagonal().copy_(2 * grad_variance)
            return centred @ by_covariance / (centred.shape[0] - 1)

    def loss(z):
        variance, off = Moments.apply(z)
        return (25 * torch.relu(1 - (variance + 1e-4).sqrt()) + off).mean()

    return loss


def without_a_function(z):
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (z.shape[0] - 1)
    variance = covariance.diagonal()
    off = covariance.square().sum(1) - variance.square()
    return (25 * torch.relu(1 - (variance + 1e-4).sqrt()) + off).mean()


def gradient(loss, z, backend=None):
    torch._dynamo.reset()
    if backend:
        loss = torch.compile(loss, backend=backend)
    return torch.autograd.grad(loss(z), z)[0]


for shape in (7, 5), (256, 64):
    torch.manual_seed(0)
    z = (0.5 * torch.randn(shape)).requires_grad_()
    loss = loss_with(diagonal_as_a_view)
    eager = gradient(loss, z)
    size = eager.abs().max()

    def off(found):
        return ((found - eager).abs().max() / size).item()

    differences = {
        "plain autograd": off(gradient(without_a_function, z)),
        "compiled, no inductor": off(gradient(loss, z, "aot_eager_decomp_partition")),
        "inductor": off(gradient(loss, z, "inductor")),
        "inductor, diagonal by index": off(gradient(loss_with(diagonal_by_index), z, "inductor")),
    }
    print(f"rows {shape}, differences from eager mode over its largest element {size:.2g}:", differences)
    wrong = differences.pop("inductor")
    assert max(differences.values()) < 1e-5, "more is wrong now"
    assert wrong > 0.1, "torch behaves differently now"
PY
for version in 2.14.1 2.11.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check torch==$version numpy==2.2.6
  "$folder/$version/bin/python" -W ignore "$folder/try.py"
done
