"""What the losses compute row by row, in O(N · D): unit rows and sums over classes.

Forward and backward are written out here because autograd's, composed of F.normalize and the rest, read the
rows two or three times as often and at small batches cost more than the kernels. Under torch.compile, which fuses,
and for a second derivative the composed form is taken: `_less_class_means` is the definition.
"""

from typing import NamedTuple

import torch

from ssl_kernels.losses._shared import unit_rows
from ssl_kernels.ops.library import accumulation_dtype

EPSILON = 1e-12  # as F.normalize


def row_dots(x, y):
    """<x_i, y_i> along the last dimension, float64."""
    return (x * y).sum(-1, dtype=torch.float64)


def less_class_means(lse, scale, x, groups, inverse_count, normalize, even):
    """lse_i less the mean of scale · <x̂_i, x̂_j> over the other rows j of i's group, (N,) float64.

    Args:
        lse, scale: (N,) float64 and 0-d.
        groups: `Groups` of the rows.
        inverse_count: (N,), 1 / the number of other rows in the group, 0 where there is none.
        even: Whether the incoming gradient is the same for all rows of a group, as after a mean or a sum.
    """
    if torch.compiler.is_compiling():
        return _less_class_means(lse, scale, x, *groups, inverse_count, normalize)
    return _LessClassMeans.apply(lse, scale, x, *groups, inverse_count, normalize, even)


class Groups(NamedTuple):
    """Which rows belong together; all int64."""

    group: torch.Tensor  # (N,) number of each row's group
    order: torch.Tensor  # (N,) rows, group by group
    starts: torch.Tensor  # where each group begins in `order`; there may be empty ones at the end


def _less_class_means(lse, scale, x, group, order, starts, inverse_count, normalize):
    rows = unit_rows(x, normalize)
    return lse - scale * row_dots(rows, _ClassSums.apply(rows, group, order, starts) - rows) * inverse_count


def _reciprocal_norms(x):
    return torch.linalg.vector_norm(x, dim=1).clamp_min_(EPSILON).reciprocal_()


def _normalized(x, normalize):
    """x̂ and its 1 / max(‖x‖, eps), None without."""
    x = x.to(accumulation_dtype(x))
    if not normalize:
        return x, None
    rnorm = _reciprocal_norms(x)
    return x * rnorm[:, None], rnorm


def _through_normalization(grad, unit, rnorm, radial, dtype):
    """The gradient by x from that by x̂ and <x̂_i, grad_i>, overwriting both. Rows shorter than eps are only scaled."""
    if rnorm is not None:
        radial = radial.masked_fill_(rnorm == 1 / EPSILON, 0)
        grad = grad.addcmul_(unit, radial[:, None], value=-1).mul_(rnorm[:, None])
    return grad.to(dtype)


def _differentiable(ctx, definition, operands, rest, grad):
    """Gradients by `operands` of definition(*operands, *rest) that can be differentiated again."""
    wanted = [operand for operand, need in zip(operands, ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(definition(*operands, *rest), wanted, grad, create_graph=True))
    return [next(found) if need else None for need in ctx.needs_input_grad[: len(operands)]]


class _LessClassMeans(torch.autograd.Function):
    """lse_i − scale r_i <x̂_i, S_i> with S_i = Σ x̂_j over the other rows of i's group.

    With w_i = −scale g_i r_i:  dx̂_i = w_i S_i + Σ_j w_j x̂_j;  dlse_i = g_i;  dscale = −Σ_i g_i r_i <x̂_i, S_i>.
    The sum over j is over the rows of S_i, so that with equal weights in a group dx̂_i = 2 w_i S_i.
    """

    @staticmethod
    def forward(ctx, lse, scale, x, group, order, starts, inverse_count, normalize, even):
        unit, rnorm = _normalized(x, normalize)
        others = _class_sums(unit, group, order, starts).sub_(unit)
        dots = (unit * others).sum(1)  # vecdot would be cast under autocast
        factor = inverse_count * -scale
        ctx.save_for_backward(
            lse, scale, x, group, order, starts, inverse_count, unit, others, dots, factor, rnorm
        )
        ctx.even = even
        return torch.addcmul(lse, dots, factor)

    @staticmethod
    def backward(ctx, grad):
        lse, scale, x, *groups, inverse_count, unit, others, dots, factor, rnorm = ctx.saved_tensors
        if torch.is_grad_enabled():
            rest = (*groups, inverse_count, rnorm is not None)
            return *_differentiable(ctx, _less_class_means, (lse, scale, x), rest, grad), *[None] * 6
        grad_scale = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_scale = -(grad * inverse_count * dots).sum().to(scale.dtype)
        if ctx.needs_input_grad[2]:
            weight = (grad * factor).to(unit.dtype)
            if ctx.even:
                weight *= 2
                grad_unit, radial = others * weight[:, None], dots * weight
            else:
                weighted = unit * weight[:, None]
                grad_unit = _class_sums(weighted, *groups).sub_(weighted).addcmul_(others, weight[:, None])
                radial = (unit * grad_unit).sum(1)
            grad_x = _through_normalization(grad_unit, unit, rnorm, radial, x.dtype)
        return grad, grad_scale, grad_x, *[None] * 6


def _class_sums(rows, group, order, starts):
    """For each row the sum of the rows of its group. A bag a group has no atomics, and on the CPU beats index_add_."""
    return torch.embedding_bag(rows, order, starts)[0].index_select(0, group)


class _ClassSums(torch.autograd.Function):
    """`_class_sums`, a symmetric map: backward is the same map."""

    @staticmethod
    def forward(ctx, rows, *groups):
        ctx.save_for_backward(*groups)
        return _class_sums(rows, *groups)

    @staticmethod
    def backward(ctx, grad):
        return _ClassSums.apply(grad, *ctx.saved_tensors), None, None, None
