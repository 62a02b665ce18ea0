"""Triton kernel of `sigmoid_pairs`; docs/sigmoid_pairs.md is the contract. Tiles: contrastive's expectation."""

import torch
import triton
import triton.language as tl

from ssl_kernels.triton.common import LOG2E, exp2, load_tile, load_vector, log1p_below_1, normalize_tile
from ssl_kernels.triton.launch import (
    finish_rows,
    launch_options,
    precision,
    row_rnorm_of,
    split_walk,
    tile_for,
    unsupported_operands,
)
from ssl_kernels.triton.tiles import WIDEST_EXPECTATION, keeps_expectation


@triton.jit(do_not_specialize=["N", "M", "diagonal", "tiles_per_split"])
def sigmoid_pairs_kernel(
    x_ptr,
    x_rnorm_ptr,
    x_weight_ptr,
    y_ptr,
    y_rnorm_ptr,
    y_weight_ptr,
    scale_ptr,
    bias_ptr,
    losses_ptr,
    biases_ptr,
    partial_ptr,
    N,
    M,
    D,
    diagonal,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    tiles_per_split,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # z_ij = scale ⟨x̂_i, ŷ_j⟩ + bias, u_ij = -z_ij where j = i + diagonal, else z_ij.
    #   losses_split,i = Σ_j softplus(u_ij)
    #   A_ij = x_weight_i y_weight_j (±) σ(u_ij), minus where j = i + diagonal;  biases_split,i = Σ_j A_ij
    #   partial_split,i = Σ_j A_ij ŷ_j
    # each only where its pointer is given; absent weights are 1. Called with rows and columns, or exchanged.
    # Tiling: a program owns BLOCK_N rows and walks the columns of its split BLOCK_M at a time; y is loaded once and
    #   multiplied twice, the sums over a tile in ACC, over tiles in float64.
    # Traffic: with B = ceil(N / BLOCK_N), y is read B times (mostly from L2), x once for each split; writes 8·N·splits
    #   bytes for each of losses and biases and 4·N·D·splits.
    # Work: 1 unit = 2·N·M·D flops for the losses, 2 with partial, in whole blocks.
    # Numerics: A is rounded to the storage type for its product. bfloat16 takes y_rnorm_j into A; float16 has not the
    #   range, so there ŷ is rounded.
    ACC: tl.constexpr = scale_ptr.dtype.element_ty
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.arange(0, BLOCK_D)
    x = load_tile(x_ptr, rows, features, N, D, stride_xn, stride_xd, EVEN_D)
    row_scale = tl.full([BLOCK_N], 1.0, ACC) * tl.load(scale_ptr)
    if x_rnorm_ptr is not None:
        row_scale *= load_vector(x_rnorm_ptr, rows, N, 0.0)
    x_weight = load_vector(x_weight_ptr, rows, N, 0.0)
    bias = tl.load(bias_ptr)
    losses = tl.zeros([BLOCK_N], tl.float64)
    biases = tl.zeros([BLOCK_N], tl.float64)
    if partial_ptr is not None:
        gradient = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    start = split * tiles_per_split * BLOCK_M
    stop = min(M, start + tiles_per_split * BLOCK_M)
    for m0 in range(start, stop, BLOCK_M):
        columns = m0 + tl.arange(0, BLOCK_M)
        y = load_tile(y_ptr, columns, features, M, D, stride_yn, stride_yd, EVEN_D)
        products = tl.dot(x, tl.trans(y), out_dtype=ACC, input_precision=PRECISION)
        y_rnorm = load_vector(y_rnorm_ptr, columns, M, 0.0)
        z = products * row_scale[:, None]
        if y_rnorm is not None:
            z *= y_rnorm[None, :]
        z += bias
        positive = columns.to(tl.int64)[None, :] == rows.to(tl.int64)[:, None] + diagonal
        inside = (rows[:, None] < N) & (columns[None, :] < M)
        u = tl.where(positive, -z, z)
        decay = exp2(-tl.abs(u) * LOG2E)
        if losses_ptr is not None:
            loss = tl.where(u > 0.0, u, 0.0) + log1p_below_1(decay)
            losses += tl.sum(tl.where(inside, loss, 0.0), axis=1).to(tl.float64)
        if partial_ptr is not None:
            coefficients = tl.where(u >= 0.0, 1.0, decay) / (1.0 + decay)
            coefficients = tl.where(positive, -coefficients, coefficients)
            if x_weight_ptr is not None:
                coefficients *= x_weight[:, None]
            if y_weight_ptr is not None:
                coefficients *= load_vector(y_weight_ptr, columns, M, 0.0)[None, :]
            coefficients = tl.where(inside, coefficients, 0.0)
            if biases_ptr is not None:
                biases += tl.sum(coefficients, axis=1).to(tl.float64)
            if y_rnorm is not None:
                if x.dtype == tl.float16:
                    y = normalize_tile(y, y_rnorm_ptr, columns, M, ACC)
                else:
                    coefficients *= y_rnorm[None, :]
            gradient = tl.dot(coefficients.to(x.dtype), y, gradient, out_dtype=ACC, input_precision=PRECISION)

    pointers = split.to(tl.int64) * N + rows
    if losses_ptr is not None:
        tl.store(losses_ptr + pointers, losses, mask=rows < N)
    if biases_ptr is not None:
        tl.store(biases_ptr + pointers, biases, mask=rows < N)
    if partial_ptr is not None:
        inside = (rows[:, None] < N) & (features[None, :] < D)
        tl.store(partial_ptr + pointers[:, None] * D + features[None, :], gradient, mask=inside)


def unsupported(rows, *_, **__):
    """Why this backend cannot run a call, or None if it can."""
    reason = unsupported_operands(rows)
    if reason is None and not keeps_expectation(rows):
        widest = WIDEST_EXPECTATION[rows.element_size()]
        return f"it takes {rows.dtype} rows up to {widest} wide, not {rows.shape[1]}"
    return reason


def _walk(x, y, scale, bias, diagonal, *, losses=False, biases=False, gradient=False):
    """Partial sums (splits, N) of losses and biases and (splits, N, D); x, y: (vectors, rnorm, weight)."""
    (n, d), m = x[0].shape, y[0].shape[0]
    tile = tile_for("expectation", x[0])
    blocks = triton.cdiv(n, tile.block_n)
    splits, tiles_per_split = split_walk(blocks, triton.cdiv(m, tile.block_m))
    loss_sums, bias_sums = (
        torch.empty(splits, n, dtype=torch.float64, device=scale.device) if wanted else None
        for wanted in (losses, biases)
    )
    partial = scale.new_empty(splits, n, d) if gradient else None
    sigmoid_pairs_kernel[blocks, splits](
        *x,
        *y,
        scale,
        bias,
        loss_sums,
        bias_sums,
        partial,
        n,
        m,
        d,
        diagonal,
        *x[0].stride(),
        *y[0].stride(),
        tiles_per_split,
        PRECISION=precision(x[0]),
        EVEN_D=d == tile.block_d,
        **launch_options(tile),
    )
    return loss_sums, bias_sums, partial


def _gradients(rows, columns, scale, bias, diagonal, bound, dtype, losses, rows_need_grad, columns_need_grad):
    """Sum of the losses or None, and the four gradients; rows and columns are (vectors, rnorm, weight)."""
    grads = [rows[0].new_empty(0, dtype=dtype) for _ in range(2)]
    first = 0 if rows_need_grad or not columns_need_grad else 1
    needed = (rows_need_grad, columns_need_grad)
    total = grad_scale = grad_bias = None
    for side in (first, 1 - first):
        own, other = (rows, columns) if side == 0 else (columns, rows)
        if side != first and not needed[side]:
            continue
        loss_sums, bias_sums, partial = _walk(
            own, other, scale, bias, diagonal if side == 0 else -diagonal,
            losses=losses and side == first, biases=side == first, gradient=True,
        )  # fmt: skip
        row_dots = scale.new_empty(own[0].shape[0])
        grad = own[0].new_empty(own[0].shape, dtype=dtype) if needed[side] else None
        finish_rows(partial, own[0], own[1], scale, bound, grad, row_dots)
        if grad is not None:
            grads[side] = grad
        if side == first:
            total = loss_sums.sum() if losses else None
            grad_scale = row_dots.sum()
            grad_bias = bias_sums.sum() if bound is None else bias_sums.sum() * bound
    return total, *grads, grad_scale, grad_bias.to(scale.dtype)


def sigmoid_pairs_fwd(
    rows, columns, scale, bias, diagonal, normalize_rows, normalize_columns, total, keep,
    rows_need_grad, columns_need_grad,
):  # fmt: skip
    """`sigmoid_pairs_fwd` of docs/sigmoid_pairs.md."""
    x = (rows, row_rnorm_of(rows, scale) if normalize_rows else None, None)
    y = (columns, row_rnorm_of(columns, scale) if normalize_columns else None, None)
    if total and keep:
        needs = (rows_need_grad, columns_need_grad)
        return _gradients(x, y, scale, bias, diagonal, None, scale.dtype, True, *needs)
    losses = _walk(x, y, scale, bias, diagonal, losses=True)[0]
    losses = losses.sum() if total else losses.sum(0)
    return losses, *(scale.new_empty(0) for _ in range(4))


def sigmoid_pairs_bwd(
    grad_losses, rows, columns, scale, bias, diagonal, normalize_rows, normalize_columns,
    rows_need_grad, columns_need_grad,
):  # fmt: skip
    """`sigmoid_pairs_bwd` of docs/sigmoid_pairs.md."""
    bound = None
    if rows.dtype == torch.float16:
        bound = grad_losses.abs().amax().clamp_min(1e-30).to(scale.dtype)
    weight = (grad_losses if bound is None else grad_losses / bound).to(scale.dtype).contiguous()
    x = (rows, row_rnorm_of(rows, scale) if normalize_rows else None, weight)
    y = (columns, row_rnorm_of(columns, scale) if normalize_columns else None, None)
    needs = (rows_need_grad, columns_need_grad)
    return _gradients(x, y, scale, bias, diagonal, bound, rows.dtype, False, *needs)[1:]
