"""Triton kernels of `sigmoid_pairs`; docs/sigmoid_pairs.md is the contract.

Where contrastive's backward keeps its gradient on chip, so does one kernel here, with the tiles of the expectation;
else coefficients go through memory (panels.py).
"""

import torch
import triton
import triton.language as tl

from ssl_kernels.arguments import SigmoidPairsBackward, SigmoidPairsForward
from ssl_kernels.triton import panels
from ssl_kernels.triton.common import (
    LOG2E,
    exp2,
    inner_products,
    load_tile,
    load_vector,
    log1p_below_1,
    normalize_tile,
)
from ssl_kernels.triton.launch import (
    aligned,
    contiguous,
    cut,
    finish_rows,
    launch_options,
    precision,
    row_rnorm_of,
    split_walk,
    tile_for,
    unsupported_operands,
)


@triton.jit
def positive_pairs(rows, columns, diagonal, x_ids, y_ids, EQUAL_ARE_POSITIVE: tl.constexpr):
    """Whether the pairs of a tile are positive: those of the diagonal, or of equal ids."""
    if EQUAL_ARE_POSITIVE:
        positive = x_ids[:, None] == y_ids[None, :]
    else:
        positive = columns.to(tl.int64)[None, :] == rows.to(tl.int64)[:, None] + diagonal
    return positive


@triton.jit
def pairs_that_count(inside, positive, x_ids, y_ids, EQUAL_ARE_POSITIVE: tl.constexpr):
    """Pairs inside the matrix but for those of equal ids, unless they are positive."""
    if x_ids is not None:
        if not EQUAL_ARE_POSITIVE:
            inside &= positive | (x_ids[:, None] != y_ids[None, :])
    return inside


@triton.jit
def signed_logits(products, row_scale, y_rnorm, bias, positive):
    """z = products · row_scale (· y_rnorm) + bias of a tile, -z where positive."""
    z = products * row_scale[:, None]
    if y_rnorm is not None:
        z *= y_rnorm[None, :]
    z += bias
    return tl.where(positive, -z, z)


@triton.jit
def pair_losses(u, decay, counts):
    """softplus(u), with decay = exp(-|u|); 0 for pairs that do not count."""
    return tl.where(counts, tl.where(u > 0.0, u, 0.0) + log1p_below_1(decay), 0.0)


@triton.jit
def pair_coefficients(u, decay, positive, counts, x_weight, y_weight):
    """x_weight_i y_weight_j (±) σ(u_ij), minus where positive, 0 for pairs that do not count; weights may be None."""
    coefficients = tl.where(u >= 0.0, 1.0, decay) / (1.0 + decay)
    coefficients = tl.where(positive, -coefficients, coefficients)
    if x_weight is not None:
        coefficients *= x_weight[:, None]
    if y_weight is not None:
        coefficients *= y_weight[None, :]
    return tl.where(counts, coefficients, 0.0)


@triton.jit(do_not_specialize=["N", "M", "diagonal", "tiles_per_split"])
def sigmoid_pairs_kernel(
    x_ptr,
    x_rnorm_ptr,
    x_weight_ptr,
    x_ids_ptr,
    y_ptr,
    y_rnorm_ptr,
    y_weight_ptr,
    y_ids_ptr,
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
    EQUAL_ARE_POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # z_ij = scale ⟨x̂_i, ŷ_j⟩ + bias, u_ij = -z_ij where j = i + diagonal, else z_ij. With ids, those of i and j equal
    # in place of j = i + diagonal where EQUAL_ARE_POSITIVE; else such pairs count only where j = i + diagonal.
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
    x_ids = load_vector(x_ids_ptr, rows, N, 0)
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
        y_ids = load_vector(y_ids_ptr, columns, M, 0)
        positive = positive_pairs(rows, columns, diagonal, x_ids, y_ids, EQUAL_ARE_POSITIVE)
        u = signed_logits(products, row_scale, y_rnorm, bias, positive)
        decay = exp2(-tl.abs(u) * LOG2E)
        inside = (rows[:, None] < N) & (columns[None, :] < M)
        counts = pairs_that_count(inside, positive, x_ids, y_ids, EQUAL_ARE_POSITIVE)
        if losses_ptr is not None:
            losses += tl.sum(pair_losses(u, decay, counts), axis=1).to(tl.float64)
        if partial_ptr is not None:
            y_weight = load_vector(y_weight_ptr, columns, M, 0.0)
            coefficients = pair_coefficients(u, decay, positive, counts, x_weight, y_weight)
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


@triton.jit(do_not_specialize=["N", "M", "diagonal", "first_row", "panel_rows"])
def sigmoid_coefficient_kernel(
    x_ptr,
    x_rnorm_ptr,
    x_weight_ptr,
    x_ids_ptr,
    y_ptr,
    y_rnorm_ptr,
    y_weight_ptr,
    y_ids_ptr,
    scale_ptr,
    bias_ptr,
    losses_ptr,
    biases_ptr,
    coefficient_ptr,
    N,
    M,
    D,
    diagonal,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    stride_c,
    first_row,
    panel_rows,
    EQUAL_ARE_POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    ONE_BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # A_ij of sigmoid_pairs_kernel for the rows first_row + [0, panel_rows), stored for panels.py to multiply, with
    # the norms of both sides unless the type is float16; the sums of losses and of A over the columns of a tile go to
    # losses and biases (column blocks, panel_rows). Each only where its pointer is given.
    # Tiling: one BLOCK_N × BLOCK_M tile a program, row blocks of the panel first, so that they share y in L2.
    # Traffic: reads ceil(M / BLOCK_M) times the panel of x and ceil(panel_rows / BLOCK_N) times y; writes
    #   panel_rows · M elements, and 8·panel_rows·ceil(M / BLOCK_M) bytes for each of losses and biases.
    # Work: 1 unit over all panels.
    ACC: tl.constexpr = scale_ptr.dtype.element_ty
    row_blocks = tl.cdiv(panel_rows, BLOCK_N)
    column_block = tl.program_id(0) // row_blocks
    panel = (tl.program_id(0) % row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = first_row + panel
    columns = column_block * BLOCK_M + tl.arange(0, BLOCK_M)
    if ONE_BLOCK_D:
        x = load_tile(x_ptr, rows, tl.arange(0, BLOCK_D), N, D, stride_xn, stride_xd, EVEN_D)
    else:
        x = None
    products = inner_products(
        x, x_ptr, y_ptr, rows, columns, N, M, D, stride_xn, stride_xd, stride_yn, stride_yd,
        EVEN_D, BLOCK_D, ACC, PRECISION,
    )  # fmt: skip
    x_rnorm = load_vector(x_rnorm_ptr, rows, N, 0.0)
    y_rnorm = load_vector(y_rnorm_ptr, columns, M, 0.0)
    row_scale = tl.full([BLOCK_N], 1.0, ACC) * tl.load(scale_ptr)
    if x_rnorm is not None:
        row_scale *= x_rnorm
    bias = tl.load(bias_ptr)
    x_ids = load_vector(x_ids_ptr, rows, N, 0)
    y_ids = load_vector(y_ids_ptr, columns, M, 0)
    positive = positive_pairs(rows, columns, diagonal, x_ids, y_ids, EQUAL_ARE_POSITIVE)
    u = signed_logits(products, row_scale, y_rnorm, bias, positive)
    decay = exp2(-tl.abs(u) * LOG2E)
    inside = (panel[:, None] < panel_rows) & (columns[None, :] < M)
    counts = pairs_that_count(inside, positive, x_ids, y_ids, EQUAL_ARE_POSITIVE)
    sums = column_block.to(tl.int64) * panel_rows + panel
    if losses_ptr is not None:
        losses = tl.sum(pair_losses(u, decay, counts).to(tl.float64), axis=1)
        tl.store(losses_ptr + sums, losses, mask=panel < panel_rows)
    if coefficient_ptr is not None:
        x_weight = load_vector(x_weight_ptr, rows, N, 0.0)
        y_weight = load_vector(y_weight_ptr, columns, M, 0.0)
        coefficients = pair_coefficients(u, decay, positive, counts, x_weight, y_weight)
        if biases_ptr is not None:
            tl.store(biases_ptr + sums, tl.sum(coefficients.to(tl.float64), axis=1), mask=panel < panel_rows)
        if coefficient_ptr.dtype.element_ty != tl.float16:
            if x_rnorm is not None:
                coefficients *= x_rnorm[:, None]
            if y_rnorm is not None:
                coefficients *= y_rnorm[None, :]
        offsets = panel.to(tl.int64)[:, None] * stride_c + columns[None, :]
        # To the end of the padded row, a multiple of 16: past M too, so that 16 bytes are stored at a time.
        inside = (panel[:, None] < panel_rows) & (columns[None, :] < stride_c)
        tl.store(coefficient_ptr + offsets, coefficients.to(coefficient_ptr.dtype.element_ty), mask=inside)


def unsupported(rows, *_, **__):
    """Why this backend cannot run a call, or None if it can."""
    return unsupported_operands(rows)


def _walk(x, y, scale, bias, diagonal, sense, *, losses=False, biases=False, gradient=False):
    """Partial sums (splits, N) of losses and biases and (splits, N, D); x, y: (vectors, rnorm, weight, ids)."""
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
        EQUAL_ARE_POSITIVE=sense,
        PRECISION=precision(x[0]),
        EVEN_D=d == tile.block_d,
        **launch_options(tile),
    )
    return loss_sums, bias_sums, partial


def _panel(
    x, y, scale, bias, diagonal, sense, first, count, *, losses=False, biases=False, coefficients=None
):
    """Sums of losses and biases (column blocks, count), float64, of `count` rows; their coefficients where given."""
    (n, d), m = x[0].shape, y[0].shape[0]
    tile = tile_for("coefficient", x[0])
    row_blocks, column_blocks = triton.cdiv(count, tile.block_n), triton.cdiv(m, tile.block_m)
    loss_sums, bias_sums = (
        torch.empty(column_blocks, count, dtype=torch.float64, device=scale.device) if wanted else None
        for wanted in (losses, biases)
    )
    sigmoid_coefficient_kernel[row_blocks * column_blocks,](
        *x,
        *y,
        scale,
        bias,
        loss_sums,
        bias_sums,
        coefficients,
        n,
        m,
        d,
        diagonal,
        *x[0].stride(),
        *y[0].stride(),
        0 if coefficients is None else coefficients.stride(0),
        first,
        count,
        EQUAL_ARE_POSITIVE=sense,
        PRECISION=precision(x[0]),
        EVEN_D=d % tile.block_d == 0,
        ONE_BLOCK_D=d <= tile.block_d,
        **launch_options(tile),
    )
    return loss_sums, bias_sums


def _losses(x, y, scale, bias, diagonal, sense):
    """The losses (N,), float64."""
    if tile_for("backward", x[0]) is not None:
        return _walk(x, y, scale, bias, diagonal, sense, losses=True)[0].sum(0)
    n, m = len(x[0]), len(y[0])
    panel = panels.panel_rows(x[0], m, tile_for("coefficient", x[0]))
    parts = (
        _panel(x, y, scale, bias, diagonal, sense, first, min(panel, n - first), losses=True)[0].sum(0)
        for first in range(0, n, panel)
    )
    return torch.cat(list(parts))


def _gradients(
    rows,
    columns,
    scale,
    bias,
    diagonal,
    sense,
    width,
    bound,
    dtype,
    losses,
    rows_need_grad,
    columns_need_grad,
):
    """Sum of the losses or None, and the four gradients; rows and columns are (vectors, rnorm, weight, ids)."""
    first = 0 if rows_need_grad or not columns_need_grad else 1
    sides = (rows, columns) if first == 0 else (columns, rows)
    needed = (rows_need_grad, columns_need_grad)
    grads = [
        side[0].new_empty(side[0].shape, dtype=dtype) if needs else None
        for side, needs in zip((rows, columns), needed, strict=True)
    ]
    made = _by_walks if tile_for("backward", rows[0]) is not None else _by_panels
    offsets = (diagonal, -diagonal) if first == 0 else (-diagonal, diagonal)
    own_grads = grads if first == 0 else grads[::-1]
    total, row_dots, grad_bias = made(*sides, scale, bias, offsets, sense, bound, losses, *own_grads)
    grad_bias = grad_bias if bound is None else grad_bias * bound
    grads = (rows[0].new_empty(0, dtype=dtype) if grad is None else cut(grad, width) for grad in grads)
    return total if losses else None, *grads, row_dots.sum(), grad_bias.to(scale.dtype)


def _by_walks(own, other, scale, bias, diagonals, sense, bound, losses, grad, other_grad):
    """(sum of the losses or None, row dots, sum of A over `bound`) of one side; writes the gradients that are given."""
    loss_sums, bias_sums, partial = _walk(
        own, other, scale, bias, diagonals[0], sense, losses=losses, biases=True, gradient=True
    )
    row_dots = scale.new_empty(len(own[0]))
    finish_rows(partial, *own[:2], scale, bound, grad, row_dots)
    if other_grad is not None:
        *_, partial = _walk(other, own, scale, bias, diagonals[1], sense, gradient=True)
        finish_rows(partial, *other[:2], scale, bound, other_grad, scale.new_empty(len(other[0])))
    return loss_sums.sum() if losses else None, row_dots, bias_sums.sum()


def _by_panels(own, other, scale, bias, diagonals, sense, bound, losses, grad, other_grad):
    """As _by_walks, from stored coefficients."""
    total = torch.zeros(2, dtype=torch.float64, device=scale.device)

    def fill(coefficients, first):
        count = len(coefficients)
        sums = _panel(
            own, other, scale, bias, diagonals[0], sense, first, count,
            losses=losses, biases=True, coefficients=coefficients,
        )  # fmt: skip
        for k, part in enumerate(sums):
            if part is not None:
                total[k] += part.sum()

    tile = tile_for("coefficient", own[0])
    row_dots = panels.panel_gradients(own[:2], other[:2], tile, fill, scale, bound, grad, other_grad)
    return total[0], row_dots, total[1]


def _sides(call, weight=None):
    """The rows and columns of a call as (vectors, rnorm, weight, ids), what the walks take besides, and the width."""
    entries, whole = len(call.rows) * len(call.columns), tile_for("backward", call.rows) is not None
    x, y = (
        (vectors, row_rnorm_of(vectors, call.scale) if normalize else None, of_rows, contiguous(ids))
        for vectors, normalize, of_rows, ids in (
            (aligned(call.rows, entries, whole), call.normalize_rows, weight, call.row_ids),
            (aligned(call.columns, entries, whole), call.normalize_columns, None, call.column_ids),
        )
    )
    return (x, y, call.scale, call.bias, call.diagonal, call.equal_ids_are_positive), call.rows.shape[1]


def sigmoid_pairs_fwd(*args):
    """`sigmoid_pairs_fwd` of docs/sigmoid_pairs.md."""
    call = SigmoidPairsForward(*args)
    sides, width = _sides(call)
    if call.total and call.keep:
        needs = (call.rows_need_grad, call.columns_need_grad)
        return _gradients(*sides, width, None, call.scale.dtype, True, *needs)
    losses = _losses(*sides)
    return losses.sum() if call.total else losses, *(call.scale.new_empty(0) for _ in range(4))


def sigmoid_pairs_bwd(*args):
    """`sigmoid_pairs_bwd` of docs/sigmoid_pairs.md."""
    call = SigmoidPairsBackward(*args)
    grad_losses, scale = call.grad_losses, call.scale
    bound = None
    if call.rows.dtype == torch.float16:
        bound = grad_losses.abs().amax().clamp_min(1e-30).to(scale.dtype)
    weight = (grad_losses if bound is None else grad_losses / bound).to(scale.dtype).contiguous()
    sides, width = _sides(call, weight)
    needs = (call.rows_need_grad, call.columns_need_grad)
    return _gradients(*sides, width, bound, call.rows.dtype, False, *needs)[1:]
