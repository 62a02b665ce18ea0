"""`row_pairs` in plain PyTorch: a few tensors of the size of x. docs/row_pairs.md is the contract."""

import torch

from ssl_kernels.chunked.rows import unit_rows, without_autocast
from ssl_kernels.constants import NORM_EPS


@without_autocast
def row_pairs_fwd(x, y, z, normalize, measure):
    x, x_rnorm = unit_rows(x, normalize)
    saved = x.new_ones(len(x), 1 if z is None else 2, 4)
    for k, other in enumerate((y, z)[: saved.shape[1]]):
        other, rnorm = unit_rows(other, normalize)
        direction = other if measure == "product" else x - other
        if normalize:
            saved[:, k, 0], saved[:, k, 1] = x_rnorm, rnorm
        saved[:, k, 3] = (direction * x).sum(1)
        if measure == "distance":
            saved[:, k, 2] = torch.linalg.vector_norm(direction, dim=1)
        else:  # of unit rows, rounding may leave a little beyond ±1
            saved[:, k, 2] = saved[:, k, 3].clamp(-1, 1) if normalize else saved[:, k, 3]
    measures = saved[:, :, 2].double()
    return (measures[:, 0] if z is None else measures[:, 0] - measures[:, 1]).clone(), saved


@without_autocast
def row_pairs_bwd(grad_values, x, y, z, saved, normalize, measure, x_needs_grad, y_needs_grad, z_needs_grad):
    x_rnorm = saved[:, 0, 0]
    unit = x.to(saved.dtype) * x_rnorm[:, None]
    grads = [x.new_empty(0) for _ in range(3)]
    grad_unit = along = 0
    pairs = ((y, 1, y_needs_grad), (z, -1, z_needs_grad))[: saved.shape[1]]
    for k, (other, sign, needs_grad) in enumerate(pairs):
        _, rnorm, measured, projection = saved[:, k].unbind(1)
        weight = sign * grad_values
        other = other.to(saved.dtype) * rnorm[:, None]
        if measure == "product":
            direction, back, along_other = other, unit, projection
        else:
            weight = torch.where(measured == 0, 0, weight / measured)
            direction = unit - other
            back, along_other = -direction, measured.square() - projection
        weight = weight.to(saved.dtype)
        if x_needs_grad:
            grad_unit = grad_unit + weight[:, None] * direction
            along = along + weight * projection
        if needs_grad:
            grad = _through(back, other, along_other, rnorm, normalize)
            grads[1 + k] = (weight[:, None] * grad).to(x.dtype)
    if x_needs_grad:
        grads[0] = _through(grad_unit, unit, along, x_rnorm, normalize).to(x.dtype)
    return tuple(grads)


def _through(grad, unit, along, rnorm, normalize):
    """The gradient by a row from that by `unit`, along = <unit, grad>; rows shorter than eps are only scaled."""
    if normalize:
        grad = grad - along.where(rnorm < 1 / NORM_EPS, 0)[:, None] * unit
    return rnorm[:, None] * grad
