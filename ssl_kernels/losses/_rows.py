"""What the losses compute row by row, in O(N · D): dots, sums over classes, logits of each row's own negatives.

Where `native` is true, the logits are a node of autograd in C++ (csrc/ops/), with its backward written out; so are, on
the CPU, losses that are little more than the values of `row_pairs`.
"""

from typing import NamedTuple

import torch

from ssl_kernels import backends
from ssl_kernels.backends import choose_backend
from ssl_kernels.checks import values_are_readable
from ssl_kernels.constants import NORM_EPS
from ssl_kernels.losses._shared import as_operand, as_scalar, may_be_one_node, reduce, unit_rows
from ssl_kernels.ops.library import accumulation_dtype, refuse_torch_func, savable
from ssl_kernels.ops.row_pairs import row_pairs
from ssl_kernels.reference.products import product


def row_dots(x, y):
    """<x_i, y_i> along the last dimension, float64."""
    return (x * y).sum(-1, dtype=torch.float64)


def row_pairs_loss(
    x,
    y,
    z=None,
    *,
    rule="linear",
    factor=1.0,
    constant=0.0,
    normalize,
    measure,
    reduction,
    row_weights=None,
    backend=None,
    caller,
):
    """Reduced losses of the values v of `row_pairs`.

    Args:
        x, y, z, normalize, measure, backend, caller: As in `row_pairs`; without z, y may also be (N,) int64, the rows
            of x that stand for its rows, of which −1 is a row's own.
        rule: "linear", factor · v + constant; "hinge", max(0, that), of which the derivative at 0 is 0; "power",
            v^constant of distances, at 0 with its gradient 0; or "logarithm", −log(v + constant).
        factor: A number, for the first two.
        constant: A number, or a tensor of one element, which gets its gradient.
        reduction, row_weights: As in `reduce`.
    """
    rows = (x, y) if z is None else (x, y, z)
    plain = row_weights is None and not isinstance(constant, torch.Tensor)
    is_node = plain and values_are_readable(*rows) and may_be_one_node(*rows)
    is_node = is_node and choose_backend("row_pairs", backend, caller, x) == "native"
    if y.dtype == torch.int64 and not (is_node and reduction != "none" and x.dtype.itemsize >= 4):
        y = x.index_select(0, y.where(y >= 0, torch.arange(y.shape[0], device=y.device)))
    if is_node:
        return backends.extension.row_pairs_loss(
            x, y, z, normalize, measure, rule, factor, float(constant), reduction, caller
        )
    values = row_pairs(x, y, z, normalize=normalize, measure=measure, backend=backend, caller=caller)
    if rule == "power":
        apart = values != 0
        losses = (values.where(apart, 1) ** _exponent(constant, x)).where(apart, 0)
    elif rule == "logarithm":
        losses = -(values + constant).log()
    else:
        losses = (values if factor == 1 else values * factor) + as_operand(constant, x)
        losses = torch.relu(losses) if rule == "hinge" else losses
    return reduce(losses, reduction, x, row_weights)


def _exponent(alpha, x):
    """torch.compile would make a graph of each number that is a power."""
    return as_scalar(alpha, x) if isinstance(alpha, torch.Tensor) or torch.compiler.is_compiling() else alpha


class Groups(NamedTuple):
    """Which rows belong together; all int64."""

    group: torch.Tensor  # (N,) number of each row's group
    order: torch.Tensor  # (N,) rows, group by group
    starts: torch.Tensor  # where each group begins in `order`; there may be empty ones at the end


def less_class_means(lse, scale, x, groups, inverse_count, normalize, chosen):
    """lse_i less the mean of scale · <x̂_i, x̂_j> over the other rows j of i's group, (N,) float64.

    Args:
        lse, scale: (N,) float64 and 0-d.
        groups: `Groups` of the rows.
        inverse_count: (N,), 1 / the number of other rows in the group, 0 where there is none.
        chosen: The backend.
    """
    rows = unit_rows(x, normalize)
    refuse_torch_func("less_class_means", chosen)
    return lse - scale * row_dots(rows, _ClassSums.apply(rows, *groups) - rows) * inverse_count


def paired_logits(x, y, scale, normalize, native):
    """scale · <x̂_i, ŷ_ij> of x (N, D) and y (N, M, D), (N, M) float64, without a normalised copy of y.

    The norms of y are factors of the products. native: whether to take csrc/ops/paired_logits.cpp.
    """
    if native:
        return torch.ops.ssl_kernels.paired_logits.native(x, y, scale, normalize)
    rows, others = unit_rows(x, normalize), savable(y.to(accumulation_dtype(y)))
    products = product(rows.unsqueeze(1), others.mT).squeeze(1).double()
    if normalize:
        products = products / torch.linalg.vector_norm(others, dim=2).clamp_min(NORM_EPS)
    return products * scale


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
