"""What the losses compute row by row, in O(N · D): unit rows, products and distances of pairs, sums over classes.

Forward and backward of each are written out here because autograd's, composed of F.normalize and the rest, read the
rows two or three times as often and at small batches cost more than the kernels. Under torch.compile, which fuses,
and for a second derivative the composed form is taken: each function has it as its definition.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ssl_kernels.losses._shared import unit_rows
from ssl_kernels.ops.library import accumulation_dtype

EPSILON = 1e-12  # as F.normalize


def row_dots(x, y):
    """<x_i, y_i> along the last dimension, float64."""
    return (x * y).sum(-1, dtype=torch.float64)


def pair_products(x, y, normalize):
    """<x̂_i, ŷ_i>, (N,) float64."""
    return _run(_PairProducts, _pair_products, x, y, normalize)


def triplet_gaps(anchor, positive, negative, normalize):
    """‖â_i − p̂_i‖ − ‖â_i − n̂_i‖, (N,) float64."""
    return _run(_TripletGaps, _triplet_gaps, anchor, positive, negative, normalize)


def less_class_means(lse, scale, x, groups, inverse_count, normalize):
    """lse_i less the mean of scale · <x̂_i, x̂_j> over the other rows j of i's group, (N,) float64.

    Args:
        lse, scale: (N,) float64 and 0-d.
        groups: `Groups` of the rows.
        inverse_count: (N,), 1 / the number of other rows in the group, 0 where there is none.
    """
    return _run(_LessClassMeans, _less_class_means, lse, scale, x, *groups, inverse_count, normalize)


class Groups(NamedTuple):
    """Which rows belong together; all int64."""

    group: torch.Tensor  # (N,) number of each row's group
    order: torch.Tensor  # (N,) rows, group by group
    starts: torch.Tensor  # where each group begins in `order`; there may be empty ones at the end


def _run(function, definition, *args):
    return (definition if torch.compiler.is_compiling() else function.apply)(*args)


def _pair_products(x, y, normalize):
    return row_dots(unit_rows(x, normalize), unit_rows(y, normalize))


def _triplet_gaps(anchor, positive, negative, normalize):
    a, p, n = (unit_rows(rows, normalize) for rows in (anchor, positive, negative))
    return (torch.linalg.vector_norm(a - p, dim=1) - torch.linalg.vector_norm(a - n, dim=1)).double()


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


def _through_normalization(grad, unit, rnorm, dtype):
    """The gradient by x from that by x̂, which it overwrites. Rows shorter than eps are only scaled."""
    if rnorm is not None:
        radial = (unit * grad).sum(1).masked_fill_(rnorm == 1 / EPSILON, 0)
        grad = grad.addcmul_(unit, radial[:, None], value=-1).mul_(rnorm[:, None])
    return grad.to(dtype)


def _differentiable(ctx, definition, operands, rest, grad):
    """Gradients by `operands` of definition(*operands, *rest) that can be differentiated again."""
    wanted = [operand for operand, need in zip(operands, ctx.needs_input_grad, strict=False) if need]
    found = iter(torch.autograd.grad(definition(*operands, *rest), wanted, grad, create_graph=True))
    return [next(found) if need else None for need in ctx.needs_input_grad[: len(operands)]]


class _PairProducts(torch.autograd.Function):
    """c = rx ry <x, y>;  dx = g rx (ry y − rx c x)."""

    @staticmethod
    def forward(ctx, x, y, normalize):
        acc = accumulation_dtype(x)
        wide_x, wide_y = x.to(acc), y.to(acc)
        products = (wide_x * wide_y).sum(1)
        rnorms = ()
        if normalize:
            rnorms = _reciprocal_norms(wide_x), _reciprocal_norms(wide_y)
            products.mul_(rnorms[0]).mul_(rnorms[1])
        ctx.save_for_backward(x, y, products, *rnorms)
        return products.double()

    @staticmethod
    def backward(ctx, grad):
        x, y, products, *rnorms = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable(ctx, _pair_products, (x, y), (bool(rnorms),), grad), None
        grad = grad.to(products.dtype)
        grads = [None, None]
        for side, (this, other) in enumerate(((x, y), (y, x))):
            if not ctx.needs_input_grad[side]:
                continue
            if not rnorms:
                grads[side] = (grad[:, None] * other).to(x.dtype)
                continue
            rnorm, other_rnorm = rnorms[side], rnorms[1 - side]
            radial = (grad * products * rnorm * rnorm).masked_fill_(rnorm == 1 / EPSILON, 0)
            wide = (grad * rnorm * other_rnorm)[:, None] * other.to(products.dtype)
            grads[side] = wide.addcmul_(this.to(products.dtype), radial[:, None], value=-1).to(x.dtype)
        return *grads, None


class _TripletGaps(torch.autograd.Function):
    """With u = (â − p̂)/‖â − p̂‖ and v = (â − n̂)/‖â − n̂‖:  dâ = g (u − v), dp̂ = −g u, dn̂ = g v; 0 at distance 0."""

    @staticmethod
    def forward(ctx, anchor, positive, negative, normalize):
        operands = (anchor, positive, negative)
        (a, a_rnorm), (p, p_rnorm), (n, n_rnorm) = (_normalized(rows, normalize) for rows in operands)
        distances, directions = zip(*(_distances(a, other) for other in (p, n)), strict=True)
        ctx.save_for_backward(*operands, a, p, n, *directions, a_rnorm, p_rnorm, n_rnorm)
        return distances[0].double() - distances[1]

    @staticmethod
    def backward(ctx, grad):
        *tensors, a_rnorm, p_rnorm, n_rnorm = ctx.saved_tensors
        operands, units, (u, v) = tensors[:3], tensors[3:6], tensors[6:]
        if torch.is_grad_enabled():
            return *_differentiable(ctx, _triplet_gaps, operands, (a_rnorm is not None,), grad), None
        grad = grad.to(u.dtype)[:, None]
        by_unit = (lambda: (u - v).mul_(grad), lambda: u * -grad, lambda: v * grad)
        rnorms = (a_rnorm, p_rnorm, n_rnorm)
        grads = [
            _through_normalization(make(), unit, rnorm, operands[0].dtype) if need else None
            for make, unit, rnorm, need in zip(by_unit, units, rnorms, ctx.needs_input_grad[:3], strict=True)
        ]
        return *grads, None


def _distances(a, b):
    """‖a_i − b_i‖ and the unit vector from b_i to a_i, 0 where they are equal."""
    direction = a - b
    distance = torch.linalg.vector_norm(direction, dim=1)
    return distance, direction.div_(distance.masked_fill(distance == 0, torch.inf)[:, None])


class _LessClassMeans(torch.autograd.Function):
    """lse_i − scale r_i <x̂_i, S_i> with S_i = Σ x̂_j over the other rows of i's group.

    With w_i = −scale g_i r_i:  dx̂_i = w_i S_i + Σ_j w_j x̂_j;  dlse_i = g_i;  dscale = −Σ_i g_i r_i <x̂_i, S_i>.
    """

    @staticmethod
    def forward(ctx, lse, scale, x, group, order, starts, inverse_count, normalize):
        unit, rnorm = _normalized(x, normalize)
        others = _class_sums(unit, group, order, starts).sub_(unit)
        means = (unit * others).sum(1).double().mul_(inverse_count)
        ctx.save_for_backward(lse, scale, x, group, order, starts, inverse_count, unit, others, means, rnorm)
        return torch.addcmul(lse, means, scale.double(), value=-1)

    @staticmethod
    def backward(ctx, grad):
        lse, scale, x, *groups, inverse_count, unit, others, means, rnorm = ctx.saved_tensors
        if torch.is_grad_enabled():
            rest = (*groups, inverse_count, rnorm is not None)
            return *_differentiable(ctx, _less_class_means, (lse, scale, x), rest, grad), *[None] * 5
        grad_scale = grad_x = None
        if ctx.needs_input_grad[1]:
            grad_scale = -(grad * means).sum().to(scale.dtype)
        if ctx.needs_input_grad[2]:
            weight = (grad * inverse_count * -scale).to(unit.dtype)[:, None]
            weighted = unit * weight
            grad_unit = _class_sums(weighted, *groups).sub_(weighted).addcmul_(others, weight)
            grad_x = _through_normalization(grad_unit, unit, rnorm, x.dtype)
        return grad, grad_scale, grad_x, *[None] * 5


def _class_sums(rows, group, order, starts):
    """For each row the sum of the rows of its group. A bag a group has no atomics, and on the CPU beats index_add_."""
    return F.embedding_bag(order, rows, starts, mode="sum").index_select(0, group)


class _ClassSums(torch.autograd.Function):
    """`_class_sums`, a symmetric map: backward is the same map."""

    @staticmethod
    def forward(ctx, rows, *groups):
        ctx.save_for_backward(*groups)
        return _class_sums(rows, *groups)

    @staticmethod
    def backward(ctx, grad):
        return _ClassSums.apply(grad, *ctx.saved_tensors), None, None, None
