"""Triton kernels of `row_pairs`; docs/row_pairs.md is the contract.

One program per row. With u_k = ŷ_k (product) or x̂ − ŷ_k (distance), y_1 = y, y_2 = z, the forward keeps r_x, r_k, m_k
and p_k = <u_k, x̂> of each pair, so that the backward has no reduction.
"""

import torch
import triton
import triton.language as tl

from ssl_kernels.ops.library import accumulation_dtype
from ssl_kernels.triton.common import NORM_EPS

WIDEST = 4096  # rows up to here are held in registers


@triton.jit
def load_part(ptr, row, d, D, stride_n, stride_d, ACC: tl.constexpr):
    """Elements d of a row in ACC, 0 outside."""
    offsets = row * stride_n + d.to(tl.int64) * stride_d
    return tl.load(ptr + offsets, mask=d < D, other=0.0).to(ACC)


@triton.jit
def norm_factor(ptr, row, part, D, stride_n, stride_d, NORMALIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """1 / max(‖row‖₂, 1e-12), or 1. `part` is the row where it is one block, else it is read here."""
    if NORMALIZE:
        squares = part * part
        for d0 in range(BLOCK_D, D, BLOCK_D):
            more = load_part(ptr, row, d0 + tl.arange(0, BLOCK_D), D, stride_n, stride_d, part.dtype)
            squares += more * more
        norm = tl.sqrt(tl.sum(squares, axis=0))
        eps = tl.full([], NORM_EPS, norm.dtype)
        rnorm = 1.0 / tl.where(norm < eps, eps, norm)
    else:
        rnorm = tl.full([], 1.0, part.dtype)
    return rnorm


@triton.jit
def scaled(part, rnorm, d, D):
    """part · rnorm; the selection keeps the product from being fused into the subtraction that follows."""
    return tl.where(d < D, part * rnorm, 0.0)


@triton.jit
def direction(x, y, DISTANCE: tl.constexpr):
    if DISTANCE:
        u = x - y
    else:
        u = y
    return u


@triton.jit
def four(saved_ptr):
    """Pointers to the four numbers of a pair, (2, 2), to be moved in one access."""
    return saved_ptr + 2 * tl.arange(0, 2)[:, None] + tl.arange(0, 2)[None, :]


@triton.jit
def measure_pair(
    x_ptr, y_ptr, saved_ptr, row, x, x_rnorm, D,
    stride_xn, stride_xd, stride_yn, stride_yd,
    NORMALIZE: tl.constexpr, DISTANCE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """m of one pair, and the four numbers of it to saved_ptr. `x` is the first block of the row."""
    d = tl.arange(0, BLOCK_D)
    y = load_part(y_ptr, row, d, D, stride_yn, stride_yd, x.dtype)
    y_rnorm = norm_factor(y_ptr, row, y, D, stride_yn, stride_yd, NORMALIZE, BLOCK_D)
    unit = scaled(x, x_rnorm, d, D)
    u = direction(unit, scaled(y, y_rnorm, d, D), DISTANCE)
    squares, projections = u * u, u * unit
    for d0 in range(BLOCK_D, D, BLOCK_D):
        more = d0 + d
        unit = scaled(load_part(x_ptr, row, more, D, stride_xn, stride_xd, x.dtype), x_rnorm, more, D)
        y = scaled(load_part(y_ptr, row, more, D, stride_yn, stride_yd, x.dtype), y_rnorm, more, D)
        u = direction(unit, y, DISTANCE)
        squares += u * u
        projections += u * unit
    projection = tl.sum(projections, axis=0)
    if DISTANCE:
        measure = tl.sqrt(tl.sum(squares, axis=0))
    else:
        measure = projection
    tl.store(four(saved_ptr), tl.join(tl.join(x_rnorm, measure), tl.join(y_rnorm, projection)))
    return measure


@triton.jit
def row_pairs_fwd_kernel(
    x_ptr, y_ptr, z_ptr, values_ptr, saved_ptr, D,
    stride_xn, stride_xd, stride_yn, stride_yd, stride_zn, stride_zd,
    NORMALIZE: tl.constexpr, DISTANCE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # value = m_1 − m_2, m_k = <u_k, x̂> or ‖u_k‖. Traffic: reads each operand once (rows wider than a block a second
    # time, from cache), writes one double and 4 numbers per pair. Sums in the type of saved; x̂ and ŷ are rounded before
    # they are subtracted, so equal rows have the distance 0.
    ACC: tl.constexpr = saved_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    x = load_part(x_ptr, row, tl.arange(0, BLOCK_D), D, stride_xn, stride_xd, ACC)
    x_rnorm = norm_factor(x_ptr, row, x, D, stride_xn, stride_xd, NORMALIZE, BLOCK_D)
    pairs: tl.constexpr = 1 if z_ptr is None else 2
    saved_ptr += row * (4 * pairs)
    value = measure_pair(
        x_ptr, y_ptr, saved_ptr, row, x, x_rnorm, D, stride_xn, stride_xd, stride_yn, stride_yd,
        NORMALIZE, DISTANCE, BLOCK_D,
    ).to(tl.float64)  # fmt: skip
    if z_ptr is not None:
        value -= measure_pair(
            x_ptr, z_ptr, saved_ptr + 4, row, x, x_rnorm, D, stride_xn, stride_xd, stride_zn, stride_zd,
            NORMALIZE, DISTANCE, BLOCK_D,
        ).to(tl.float64)  # fmt: skip
    tl.store(values_ptr + row, value)


@triton.jit
def store_gradient(grad_ptr, row, d, D, grad, along, unit, factor, rnorm, NORMALIZE: tl.constexpr):
    """factor · (grad − along · unit), the second term only where the row was normalised to length 1."""
    if NORMALIZE:
        # 1e12 rounded to float32 is one of the values that a norm at the bound can give, hence the margin.
        grad -= tl.where(rnorm < 0.999999e12, along, 0.0) * unit
    tl.store(grad_ptr + row * D + d, (factor * grad).to(grad_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def differentiate_pair(
    y_ptr, saved_ptr, grad_ptr, row, d, x, g, D, stride_n, stride_d,
    NORMALIZE: tl.constexpr, DISTANCE: tl.constexpr,
):  # fmt: skip
    """(x̂, r_x, w u, w p) of one pair and a block of x, and its gradient by y to grad_ptr unless None."""
    first, second = tl.split(tl.load(four(saved_ptr)))
    x_rnorm, measure = tl.split(first)
    y_rnorm, projection = tl.split(second)
    x = scaled(x, x_rnorm, d, D)
    y = scaled(load_part(y_ptr, row, d, D, stride_n, stride_d, x.dtype), y_rnorm, d, D)
    u = direction(x, y, DISTANCE)
    if DISTANCE:
        w = tl.where(measure == 0, 0.0, g / tl.where(measure == 0, 1.0, measure))
        if grad_ptr is not None:
            along = projection - measure * measure
            store_gradient(grad_ptr, row, d, D, u, along, y, -w * y_rnorm, y_rnorm, NORMALIZE)
    else:
        w = g
        if grad_ptr is not None:
            store_gradient(grad_ptr, row, d, D, x, projection, y, w * y_rnorm, y_rnorm, NORMALIZE)
    return x, x_rnorm, w * u, w * projection


@triton.jit
def row_pairs_bwd_kernel(
    grad_values_ptr, x_ptr, y_ptr, z_ptr, saved_ptr, grad_x_ptr, grad_y_ptr, grad_z_ptr, D,
    stride_xn, stride_xd, stride_yn, stride_yd, stride_zn, stride_zd,
    NORMALIZE: tl.constexpr, DISTANCE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # With w_1 = g, w_2 = −g, for the distance over m_k, 0 where that is 0:
    #   dx = r_x (Σ_k w_k u_k − (Σ_k w_k p_k) x̂)
    #   dy_k = r_k w_k (x̂ − p_k ŷ_k), or −r_k w_k (u_k − (p_k − m_k²) ŷ_k)
    # Traffic: reads each operand once, 1 double and 4 numbers per pair, writes the gradients that are needed once.
    ACC: tl.constexpr = saved_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    g = tl.load(grad_values_ptr + row).to(ACC)
    pairs: tl.constexpr = 1 if z_ptr is None else 2
    saved_ptr += row * (4 * pairs)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = load_part(x_ptr, row, d, D, stride_xn, stride_xd, ACC)
        unit, x_rnorm, grad_x, along = differentiate_pair(
            y_ptr, saved_ptr, grad_y_ptr, row, d, x, g, D, stride_yn, stride_yd, NORMALIZE, DISTANCE
        )
        if z_ptr is not None:
            _, _, more, more_along = differentiate_pair(
                z_ptr, saved_ptr + 4, grad_z_ptr, row, d, x, -g, D, stride_zn, stride_zd, NORMALIZE, DISTANCE
            )
            grad_x += more
            along += more_along
        if grad_x_ptr is not None:
            store_gradient(grad_x_ptr, row, d, D, grad_x, along, unit, x_rnorm, x_rnorm, NORMALIZE)


def unsupported(x, *_):
    """Why this backend cannot run a call, or None if it can."""
    return None if len(x) < 2**31 else f"{len(x)} rows are more than a grid has programs"


def _options(x, y, z, normalize, measure):
    width = x.shape[1]
    strides = zip(("x", "y", "z"), (x, y, x if z is None else z), strict=True)
    return {
        **{f"stride_{name}{axis}": rows.stride(i) for name, rows in strides for i, axis in enumerate("nd")},
        "NORMALIZE": normalize,
        "DISTANCE": measure == "distance",
        "BLOCK_D": min(WIDEST, triton.next_power_of_2(width)),
        "num_warps": 1 if width <= 512 else 4 if width <= 2048 else 8,
    }


def row_pairs_fwd(x, y, z, normalize, measure):
    """`row_pairs_fwd` of docs/row_pairs.md."""
    values = x.new_empty(len(x), dtype=torch.float64)
    saved = x.new_empty((len(x), 1 if z is None else 2, 4), dtype=accumulation_dtype(x))
    options = _options(x, y, z, normalize, measure)
    row_pairs_fwd_kernel[len(x),](x, y, z, values, saved, x.shape[1], **options)
    return values, saved


def row_pairs_bwd(grad_values, x, y, z, saved, normalize, measure, *needs_grad):
    """`row_pairs_bwd` of docs/row_pairs.md."""
    grads = [
        torch.empty_like(x, memory_format=torch.contiguous_format) if need else None for need in needs_grad
    ]
    options = _options(x, y, z, normalize, measure)
    grad_values, saved = grad_values.contiguous(), saved.contiguous()
    row_pairs_bwd_kernel[len(x),](grad_values, x, y, z, saved, *grads, x.shape[1], **options)
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)
