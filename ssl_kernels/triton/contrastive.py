"""Triton kernels of `contrastive`; docs/contrastive.md is the contract. Tiles come from `tiles.py`."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ssl_kernels.triton.common import (
    LN2,
    LOG2E,
    column_softmax,
    exclude,
    exp2,
    finite_shift,
    index_range,
    inner_products,
    load_index,
    load_tile,
    load_vector,
    merge_lse_kernel,
    natural_lse,
    normalize_tile,
    online_softmax,
    row_inner_products,
    scale_logits,
    through_norm,
)
from ssl_kernels.triton.launch import (
    contiguous,
    finish_rows,
    launch_options,
    precision,
    row_rnorm_of,
    split_walk,
    tile_for,
    unsupported_operands,
)
from ssl_kernels.triton.tiles import WIDEST_EXPECTATION, keeps_expectation

# Scratch that does not grow with the problem: column sums of the forward and coefficients of the backward are
# worked off in panels of rows that stay below this.
SCRATCH_BYTES = 128 << 20


# --- forward ----------------------------------------------------------------------------------------------


@triton.jit
def store_positive_logits(logits, positives_ptr, out_ptr, rows, columns, m0, N, M, P):
    """Writes the logits of this tile that `positives` (N, P) names; each lies in exactly one tile."""
    BLOCK_M: tl.constexpr = logits.shape[1]
    for k in range(P):
        index = load_index(positives_ptr, rows, k, N, M, P)
        picked = tl.sum(tl.where(index[:, None] == columns[None, :], logits, 0.0), axis=1)
        here = (rows < N) & (index >= m0) & (index < m0 + BLOCK_M) & (index < M)
        tl.store(out_ptr + rows.to(tl.int64) * P + k, LN2 * picked.to(tl.float64), mask=here)


@triton.jit(do_not_specialize=["N", "M", "P", "first_block", "tiles_per_split", "column_slots"])
def contrastive_fwd_kernel(
    x_ptr,
    y_ptr,
    scale_ptr,
    x_rnorm_ptr,
    y_rnorm_ptr,
    x_ids_ptr,
    y_ids_ptr,
    positives_ptr,
    positive_logits_ptr,
    lse_ptr,
    row_partial_ptr,
    column_partial_ptr,
    expectation_partial_ptr,
    N,
    M,
    D,
    P,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    first_block,
    tiles_per_split,
    column_slots,
    SQUARE: tl.constexpr,
    KEEP_DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    ONE_BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # x (N, D), y (M, D), s_ij = scale · x_rnorm_i · y_rnorm_j · ⟨x_i, y_j⟩.
    #   lse_i = log Σ_{j allowed} exp(s_ij);   positive_logits_ik = s_{i, positives(i, k)}
    #   column_partial: the same sums over the rows of each row block, merged by merge_lse_kernel into
    #   column_lse
    # Tiling: a program owns BLOCK_N rows and walks the columns of its split BLOCK_M at a time, running
    #   maximum and sum in registers. With ONE_BLOCK_D (D <= BLOCK_D) its rows stay on chip; else each tile
    #   loops over D. Where the walk is split, maxima and sums go to row_partial (2, splits, N) and
    #   merge_lse_kernel finishes them. column_partial (2, slots, M) likewise, from slot 1 on.
    # Expectation: with expectation_partial (splits, N, D) also Σ_j 2^(s'_ij - maximum_i) ŷ_j, attention with V = K: y
    #   is loaded once and multiplied twice, the sum scaled down where the maximum rises. Needs ONE_BLOCK_D and
    #   row_partial; expectation_merge_kernel makes E of both. 2 units, and 4·splits·N·D bytes more.
    # Dtypes: y may be narrower than x (a bfloat16 queue); it is widened on chip, after it was read.
    # Traffic: with B = ceil(N / BLOCK_N), y is read B times (mostly from L2), x once for each split or,
    #   without ONE_BLOCK_D, ceil(M / BLOCK_M) times. Every warp reads y_rnorm: 4·B·M·num_warps bytes, on
    #   sm_90 twice that. Writes 8·N·(1 + P) bytes, or 8·N·splits; 8·B·M for column sums.
    # Work: 1 unit = 2·N·M·D flops, N, M and D rounded up to whole blocks; in both directions too, with two exponentials
    #   an entry in the place of one.
    # Numerics: products of the stored x and y accumulated in ACC, where everything else happens; norms enter
    #   as factors of the product, so there is no rounded normalised copy. A true running maximum: any scale
    #   is exact.
    ACC: tl.constexpr = scale_ptr.dtype.element_ty
    block = first_block + tl.program_id(0)
    split = tl.program_id(1)
    n0 = block * BLOCK_N
    rows = n0 + tl.arange(0, BLOCK_N)

    if ONE_BLOCK_D:
        x = load_tile(x_ptr, rows, tl.arange(0, BLOCK_D), N, D, stride_xn, stride_xd, EVEN_D)
    else:
        x = None
    row_scale = tl.full([BLOCK_N], LOG2E, ACC) * tl.load(scale_ptr)
    if x_rnorm_ptr is not None:
        row_scale *= tl.load(x_rnorm_ptr + rows, mask=rows < N, other=0.0)
    row_ids = load_vector(x_ids_ptr, rows, N, 0)
    if positives_ptr is not None:
        lowest, highest = index_range(positives_ptr, rows, N, M, P)

    maximum = tl.full([BLOCK_N], float("-inf"), ACC)
    total = tl.zeros([BLOCK_N], ACC)
    if expectation_partial_ptr is not None:
        expectation = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    start = split * tiles_per_split * BLOCK_M
    stop = min(M, start + tiles_per_split * BLOCK_M)
    for m0 in range(start, stop, BLOCK_M):
        columns = m0 + tl.arange(0, BLOCK_M)
        if expectation_partial_ptr is not None:
            y = load_tile(y_ptr, columns, tl.arange(0, BLOCK_D), M, D, stride_yn, stride_yd, EVEN_D).to(
                x.dtype
            )
            products = tl.dot(x, tl.trans(y), out_dtype=ACC, input_precision=PRECISION)
        else:
            products = inner_products(
                x, x_ptr, y_ptr, rows, columns, N, M, D, stride_xn, stride_xd, stride_yn, stride_yd,
                EVEN_D, BLOCK_D, ACC, PRECISION,
            )  # fmt: skip
        logits = scale_logits(products, row_scale, load_vector(y_rnorm_ptr, columns, M, 0.0), columns, M)
        if positives_ptr is not None:
            if (lowest < m0 + BLOCK_M) & (highest >= m0):
                store_positive_logits(logits, positives_ptr, positive_logits_ptr, rows, columns, m0, N, M, P)
        column_ids = load_vector(y_ids_ptr, columns, M, 0)
        logits = exclude(logits, row_ids, column_ids, rows, columns, SQUARE, KEEP_DIAGONAL)
        if expectation_partial_ptr is not None:
            new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
            shift = finite_shift(new_maximum)
            shrink = exp2(maximum - shift)
            maximum = new_maximum
            weights = exp2(logits - shift[:, None])
            total = total * shrink + tl.sum(weights, axis=1)
            if y_rnorm_ptr is not None:
                if x.dtype == tl.float16:
                    y = normalize_tile(y, y_rnorm_ptr, columns, M, ACC)
                else:
                    weights *= load_vector(y_rnorm_ptr, columns, M, 0.0)[None, :]
            expectation *= shrink[:, None]
            expectation = tl.dot(
                weights.to(x.dtype), y, expectation, out_dtype=ACC, input_precision=PRECISION
            )
        else:
            maximum, total = online_softmax(maximum, total, logits)
        if column_partial_ptr is not None:
            inside = tl.where(rows[:, None] < N, logits, float("-inf"))
            column_maximum, column_total = column_softmax(inside)
            pointers = column_partial_ptr + (1 + tl.program_id(0)).to(tl.int64) * M + columns
            tl.store(pointers, column_maximum, mask=columns < M)
            tl.store(pointers + column_slots.to(tl.int64) * M, column_total, mask=columns < M)

    if row_partial_ptr is not None:
        pointers = row_partial_ptr + split.to(tl.int64) * N + rows
        tl.store(pointers, maximum, mask=rows < N)
        tl.store(pointers + tl.num_programs(1).to(tl.int64) * N, total, mask=rows < N)
    else:
        tl.store(lse_ptr + rows, natural_lse(maximum, total), mask=rows < N)
    if expectation_partial_ptr is not None:
        features = tl.arange(0, BLOCK_D)
        pointers = expectation_partial_ptr + (split.to(tl.int64) * N + rows.to(tl.int64))[:, None] * D
        inside = (rows[:, None] < N) & (features[None, :] < D)
        tl.store(pointers + features[None, :], expectation, mask=inside)


@triton.jit(do_not_specialize=["N", "splits"])
def expectation_merge_kernel(
    row_partial_ptr,
    expectation_partial_ptr,
    expectation_ptr,
    N,
    D,
    splits,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # E_i = Σ_split 2^(maximum_split,i - maximum_i) partial_split,i / Σ_split 2^(maximum_split,i - maximum_i)
    # total_split,i, for row_partial (2, splits, N) and expectation_partial (splits, N, D); 0 where nothing was allowed.
    # Traffic: reads partial once, writes N·D.
    ACC: tl.constexpr = expectation_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (rows[:, None] < N) & (features[None, :] < D)
    maximum = tl.full([BLOCK_N], float("-inf"), ACC)
    total = tl.zeros([BLOCK_N], ACC)
    expectation = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for split in range(splits):
        pointers = row_partial_ptr + split.to(tl.int64) * N + rows
        part_maximum = tl.load(pointers, mask=rows < N, other=float("-inf"))
        part_total = tl.load(pointers + splits.to(tl.int64) * N, mask=rows < N, other=0.0)
        offsets = (split.to(tl.int64) * N + rows.to(tl.int64))[:, None] * D + features[None, :]
        part = tl.load(expectation_partial_ptr + offsets, mask=inside, other=0.0)
        new_maximum = tl.maximum(maximum, part_maximum)
        shift = finite_shift(new_maximum)
        shrink, part_shrink = exp2(maximum - shift), exp2(part_maximum - shift)
        total = total * shrink + part_total * part_shrink
        expectation = expectation * shrink[:, None] + part * part_shrink[:, None]
        maximum = new_maximum
    expectation = tl.where((total == 0.0)[:, None], 0.0, expectation / total[:, None])
    tl.store(expectation_ptr + rows.to(tl.int64)[:, None] * D + features[None, :], expectation, mask=inside)


# --- backward ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["N"])
def softmax_weight_kernel(lse_ptr, grad_ptr, bound_ptr, log2_lse_ptr, weight_ptr, N, BLOCK_N: tl.constexpr):
    # grad_i exp(s - lse_i) = weight_i 2^(s' - log2_lse_i) with s' = s · log2 e: log2_lse_i is lse_i · log2 e
    # rounded to its type, weight_i takes the rounding and 1 / bound. lse_i = -inf (nothing was allowed) gives
    # +inf, hence 0 later.
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exact = LOG2E * tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
    weight = tl.load(grad_ptr + rows, mask=rows < N, other=0.0)
    if bound_ptr is not None:
        weight /= tl.load(bound_ptr).to(tl.float64)
    rounded = exact.to(log2_lse_ptr.dtype.element_ty)
    empty = exact == float("-inf")
    weight *= tl.where(empty, 1.0, exp2((rounded.to(tl.float64) - exact).to(tl.float32)).to(tl.float64))
    tl.store(log2_lse_ptr + rows, tl.where(empty, float("inf"), rounded), mask=rows < N)
    tl.store(weight_ptr + rows, weight.to(weight_ptr.dtype.element_ty), mask=rows < N)


@triton.jit
def softmax_coefficients(logits, row_lse, row_weight, column_lse, column_weight):
    """row_weight_i 2^(s'_ij - row_lse_i) + column_weight_j 2^(s'_ij - column_lse_j); None: no such side."""
    if row_lse is not None:
        coefficients = row_weight[:, None] * exp2(logits - row_lse[:, None])
        if column_lse is not None:
            coefficients += column_weight[None, :] * exp2(logits - column_lse[None, :])
    elif column_lse is not None:
        coefficients = column_weight[None, :] * exp2(logits - column_lse[None, :])
    else:
        coefficients = tl.zeros(logits.shape, logits.dtype)
    return coefficients


@triton.jit
def add_row_positives(coefficients, positives_ptr, grad_ptr, rows, columns, N, P: tl.constexpr):
    """Adds grad_ik at (i, positives(i, k)) for the rows of the tile.

    Every tile compares: behind a branch on whether the tile has any, the compiler spills the accumulator.
    """
    for k in tl.static_range(P):
        offsets = rows.to(tl.int64) * P + k
        index = tl.load(positives_ptr + offsets, mask=rows < N, other=-1)
        grad = tl.load(grad_ptr + offsets, mask=rows < N, other=0.0)
        coefficients += tl.where(index[:, None] == columns[None, :], grad[:, None], 0.0)
    return coefficients


@triton.jit
def add_column_positives(coefficients, positives_ptr, grad_ptr, rows, columns, M, P: tl.constexpr):
    """Adds grad_jk at (positives(j, k), j) for the columns of the tile."""
    for k in tl.static_range(P):
        offsets = columns.to(tl.int64) * P + k
        index = tl.load(positives_ptr + offsets, mask=columns < M, other=-1)
        grad = tl.load(grad_ptr + offsets, mask=columns < M, other=0.0)
        coefficients += tl.where(index[None, :] == rows[:, None], grad[None, :], 0.0)
    return coefficients


@triton.jit(do_not_specialize=["N", "M", "tiles_per_split"])
def contrastive_bwd_kernel(
    x_ptr,
    x_rnorm_ptr,
    x_lse_ptr,
    x_weight_ptr,
    x_ids_ptr,
    x_positives_ptr,
    x_grad_positives_ptr,
    y_ptr,
    y_rnorm_ptr,
    y_lse_ptr,
    y_weight_ptr,
    y_ids_ptr,
    y_positives_ptr,
    y_grad_positives_ptr,
    scale_ptr,
    bound_ptr,
    grad_ptr,
    row_dots_ptr,
    partial_ptr,
    N,
    M,
    D,
    P: tl.constexpr,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    tiles_per_split,
    SQUARE: tl.constexpr,
    KEEP_DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Gradient of the rows x (N, D) of one side; the other side is y (M, D). Called with rows and columns,
    # with both exchanged, or in the square case with the same side twice. With s as in the forward kernel,
    #   C_ij = allowed_ij (x_weight_i 2^(s'_ij - x_lse_i) + y_weight_j 2^(s'_ij - y_lse_j))
    #          + Σ_k [x_positives(i, k) = j] x_grad_positives_ik
    #          + Σ_k [y_positives(j, k) = i] y_grad_positives_jk
    #   g_i = Σ_j C_ij ŷ_j;   row_dots_i = ⟨x̂_i, g_i⟩;   grad_i = d(x̂_i)/d(x_i) · scale · g_i
    # Square: C is A + Aᵀ, symmetric, so this one product is the whole gradient.
    # Tiling: as the forward kernel with D <= BLOCK_D; y is loaded once and multiplied twice, g stays in
    #   registers. Where the walk is split, g goes to partial (splits, N, D) and finish_rows_kernel
    #   does the last line.
    # Traffic: with B = ceil(N / BLOCK_N), y is read B times (mostly from L2), x once for each split, and each
    #   of a column's rnorm, lse, weight, positive and its gradient takes 4·B·M bytes. Writes N·D elements,
    #   or 4·splits·N·D bytes of partial.
    # Work: 2 units of 2·N·M·D flops, N, M and D rounded up to whole blocks: logits again, and one product.
    # Numerics: C is rounded to the storage type for its product. bfloat16 takes y_rnorm_j into C; float16 has
    #   not the range, so there ŷ is rounded as plain PyTorch does, and incoming gradients are divided by
    #   `bound`, their largest magnitude, so that softmax probabilities of a mean over many rows do not
    #   vanish.
    ACC: tl.constexpr = scale_ptr.dtype.element_ty
    n0 = tl.program_id(0) * BLOCK_N
    split = tl.program_id(1)
    rows = n0 + tl.arange(0, BLOCK_N)
    features = tl.arange(0, BLOCK_D)

    x = load_tile(x_ptr, rows, features, N, D, stride_xn, stride_xd, EVEN_D)
    scale = tl.load(scale_ptr)
    x_rnorm = load_vector(x_rnorm_ptr, rows, N, 0.0)
    row_scale = tl.full([BLOCK_N], LOG2E, ACC) * scale
    if x_rnorm is not None:
        row_scale *= x_rnorm
    bound = tl.full([], 1.0, ACC)
    if bound_ptr is not None:
        bound = tl.load(bound_ptr)
    x_lse = load_vector(x_lse_ptr, rows, N, 0.0)
    x_weight = load_vector(x_weight_ptr, rows, N, 0.0)
    x_ids = load_vector(x_ids_ptr, rows, N, 0)

    gradient = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    start = split * tiles_per_split * BLOCK_M
    stop = min(M, start + tiles_per_split * BLOCK_M)
    for m0 in range(start, stop, BLOCK_M):
        columns = m0 + tl.arange(0, BLOCK_M)
        y = load_tile(y_ptr, columns, features, M, D, stride_yn, stride_yd, EVEN_D)
        products = tl.dot(x, tl.trans(y), out_dtype=ACC, input_precision=PRECISION)
        y_rnorm = load_vector(y_rnorm_ptr, columns, M, 0.0)
        logits = scale_logits(products, row_scale, y_rnorm, columns, M)
        y_ids = load_vector(y_ids_ptr, columns, M, 0)
        logits = exclude(logits, x_ids, y_ids, rows, columns, SQUARE, KEEP_DIAGONAL)
        coefficients = softmax_coefficients(
            logits,
            x_lse,
            x_weight,
            load_vector(y_lse_ptr, columns, M, 0.0),
            load_vector(y_weight_ptr, columns, M, 0.0),
        )
        if x_positives_ptr is not None:
            coefficients = add_row_positives(
                coefficients, x_positives_ptr, x_grad_positives_ptr, rows, columns, N, P
            )
        if y_positives_ptr is not None:
            coefficients = add_column_positives(
                coefficients, y_positives_ptr, y_grad_positives_ptr, rows, columns, M, P
            )
        if y_rnorm is not None:
            if x.dtype == tl.float16:
                y = normalize_tile(y, y_rnorm_ptr, columns, M, ACC)
            else:
                coefficients *= y_rnorm[None, :]
        gradient = tl.dot(coefficients.to(x.dtype), y, gradient, out_dtype=ACC, input_precision=PRECISION)

    inside = rows[:, None] < N
    if not EVEN_D:
        inside &= features[None, :] < D
    offsets = rows.to(tl.int64)[:, None] * D + features[None, :]
    if partial_ptr is not None:
        tl.store(partial_ptr + split.to(tl.int64) * N * D + offsets, gradient, mask=inside)
    else:
        # Loaded again: held until here in this layout, it would take registers from the walk.
        x = load_tile(x_ptr, rows, features, N, D, stride_xn, stride_xd, EVEN_D).to(ACC)
        gradient *= bound
        row_dots = row_inner_products(x, gradient, rows[:, None] < N)
        if x_rnorm is not None:
            row_dots *= x_rnorm
            gradient = through_norm(gradient, x, x_rnorm, row_dots)
        tl.store(row_dots_ptr + rows, row_dots, mask=rows < N)
        if grad_ptr is not None:
            tl.store(grad_ptr + offsets, (scale * gradient).to(grad_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "M", "first_row", "panel_rows"])
def contrastive_coefficient_kernel(
    x_ptr,
    x_rnorm_ptr,
    x_lse_ptr,
    x_weight_ptr,
    x_ids_ptr,
    x_positives_ptr,
    x_grad_positives_ptr,
    y_ptr,
    y_rnorm_ptr,
    y_lse_ptr,
    y_weight_ptr,
    y_ids_ptr,
    y_positives_ptr,
    y_grad_positives_ptr,
    scale_ptr,
    coefficient_ptr,
    N,
    M,
    D,
    P: tl.constexpr,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    stride_c,
    first_row,
    panel_rows,
    SQUARE: tl.constexpr,
    KEEP_DIAGONAL: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    ONE_BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # C_ij of contrastive_bwd_kernel for the rows first_row + [0, panel_rows), stored, where D is too wide for
    #   an
    # accumulator: contrastive_product_kernel multiplies it. With norms, and unless the type is float16, what
    # is stored is x_rnorm_i C_ij y_rnorm_j, so that either product takes its other operand as it lies in
    # memory.
    # Tiling: one BLOCK_N × BLOCK_M tile a program, row blocks of the panel first, so that they share y in L2.
    # Traffic: reads ceil(M / BLOCK_M) times the panel of x and ceil(panel_rows / BLOCK_N) times y; writes
    #   panel_rows · M elements.
    # Work: 1 unit over all panels.
    ACC: tl.constexpr = scale_ptr.dtype.element_ty
    row_blocks = tl.cdiv(panel_rows, BLOCK_N)
    panel_row = (tl.program_id(0) % row_blocks) * BLOCK_N
    n0 = first_row + panel_row
    m0 = (tl.program_id(0) // row_blocks) * BLOCK_M
    rows = n0 + tl.arange(0, BLOCK_N)
    columns = m0 + tl.arange(0, BLOCK_M)

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
    row_scale = tl.full([BLOCK_N], LOG2E, ACC) * tl.load(scale_ptr)
    if x_rnorm is not None:
        row_scale *= x_rnorm
    logits = scale_logits(products, row_scale, y_rnorm, columns, M)
    x_ids = load_vector(x_ids_ptr, rows, N, 0)
    y_ids = load_vector(y_ids_ptr, columns, M, 0)
    logits = exclude(logits, x_ids, y_ids, rows, columns, SQUARE, KEEP_DIAGONAL)
    coefficients = softmax_coefficients(
        logits,
        load_vector(x_lse_ptr, rows, N, 0.0),
        load_vector(x_weight_ptr, rows, N, 0.0),
        load_vector(y_lse_ptr, columns, M, 0.0),
        load_vector(y_weight_ptr, columns, M, 0.0),
    )
    if x_positives_ptr is not None:
        coefficients = add_row_positives(
            coefficients, x_positives_ptr, x_grad_positives_ptr, rows, columns, N, P
        )
    if y_positives_ptr is not None:
        coefficients = add_column_positives(
            coefficients, y_positives_ptr, y_grad_positives_ptr, rows, columns, M, P
        )
    if coefficient_ptr.dtype.element_ty != tl.float16:
        if x_rnorm is not None:
            coefficients *= x_rnorm[:, None]
        if y_rnorm is not None:
            coefficients *= y_rnorm[None, :]

    panel = panel_row + tl.arange(0, BLOCK_N)
    offsets = panel.to(tl.int64)[:, None] * stride_c + columns[None, :]
    inside = (panel[:, None] < panel_rows) & (columns[None, :] < M)
    tl.store(coefficient_ptr + offsets, coefficients.to(coefficient_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "K", "tiles_per_split"])
def contrastive_product_kernel(
    a_ptr,
    b_ptr,
    b_rnorm_ptr,
    partial_ptr,
    N,
    K,
    D,
    stride_an,
    stride_ak,
    stride_bn,
    stride_bd,
    tiles_per_split,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # partial_split,i = (partial_split,i +) Σ_{k in split} a_ik b_k: a (N, K) a panel of coefficients or its
    # transpose, b (K, D) rows or columns, partial (splits, N, D). b is normalised here where the panel could
    # not hold the norms.
    # Tiling: one BLOCK_N × BLOCK_D tile of the result a program, K walked BLOCK_M at a time.
    # Traffic: reads a ceil(D / BLOCK_D) times and b ceil(N / BLOCK_N) times; writes N·D sums for each split.
    # Work: 1 unit over all panels.
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    d_blocks = tl.cdiv(D, BLOCK_D)
    rows = (tl.program_id(0) // d_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = (tl.program_id(0) % d_blocks) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1)

    product = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    start = split * tiles_per_split * BLOCK_M
    stop = min(K, start + tiles_per_split * BLOCK_M)
    for k0 in range(start, stop, BLOCK_M):
        inner = k0 + tl.arange(0, BLOCK_M)
        a = load_tile(a_ptr, rows, inner, N, K, stride_an, stride_ak, False)
        b = load_tile(b_ptr, inner, features, K, D, stride_bn, stride_bd, EVEN_D)
        if b_rnorm_ptr is not None:
            b = normalize_tile(b, b_rnorm_ptr, inner, K, ACC)
        product = tl.dot(a, b, product, out_dtype=ACC, input_precision=PRECISION)

    pointers = partial_ptr + (split.to(tl.int64) * N + rows.to(tl.int64))[:, None] * D + features[None, :]
    inside = (rows[:, None] < N) & (features[None, :] < D)
    if ACCUMULATE:
        product += tl.load(pointers, mask=inside, other=0.0)
    tl.store(pointers, product, mask=inside)


# --- host -------------------------------------------------------------------------------------------------


class Side(NamedTuple):
    """One side of the similarity matrix in backward, rows or columns: vectors and what belongs to each."""

    vectors: torch.Tensor  # (N, D)
    rnorm: torch.Tensor | None
    log2_lse: torch.Tensor | None
    weight: torch.Tensor | None  # of the softmax, the incoming gradient of lse: see softmax_weight_kernel
    ids: torch.Tensor | None
    positives: torch.Tensor | None  # (N, P) int32
    grad_positives: torch.Tensor | None  # over `bound`, in scale's type


def unsupported(rows, columns=None, *_, **__):
    """Why this backend cannot run a call, or None if it can; takes the arguments of `contrastive_fwd`."""
    if columns is not None and columns.dtype != rows.dtype and not keeps_expectation(rows):
        return f"columns of another dtype than rows are at most {WIDEST_EXPECTATION[4]} wide, not {rows.shape[1]}"
    return unsupported_operands(rows, columns)


def contrastive_fwd(
    rows,
    columns,
    scale,
    positives,
    row_ids,
    column_ids,
    normalize_rows,
    normalize_columns,
    keep_diagonal,
    both_directions,
    keep,
    columns_need_grad,
):
    """`contrastive_fwd` of docs/contrastive.md."""
    square = columns is None
    n, d = rows.shape
    m = n if square else columns.shape[0]
    row_rnorm = row_rnorm_of(rows, scale) if normalize_rows else None
    if square:
        columns, column_ids, column_rnorm = rows, row_ids, row_rnorm
    else:
        column_rnorm = row_rnorm_of(columns, scale) if normalize_columns else None
    if positives is not None and positives.numel() == 0:
        positive_logits, positives = _empty_float64(scale, positives.shape), None
    elif positives is not None:
        positives = positives.contiguous()
        positive_logits = _empty_float64(scale, positives.shape)
    else:
        positive_logits = _empty_float64(scale, 0)

    expectation = None
    if not square and keep and not columns_need_grad and not both_directions and keeps_expectation(rows):
        expectation = scale.new_empty(n, d)
    tile = tile_for("forward" if expectation is None else "expectation", rows)
    blocks, tiles = triton.cdiv(n, tile.block_n), triton.cdiv(m, tile.block_m)
    splits, tiles_per_split = split_walk(blocks, tiles)
    lse = _empty_float64(scale, n)
    row_partial = scale.new_empty(2, splits, n) if splits > 1 or expectation is not None else None
    expectation_partial = None if expectation is None else scale.new_empty(splits, n, d)
    # The column sums of each row block are merged panel by panel, in scratch that does not grow with N.
    panel = blocks
    if both_directions:
        panel = min(blocks, max(1, SCRATCH_BYTES // (2 * m * scale.element_size())))
    column_partial = scale.new_empty(2, 1 + panel, m) if both_directions else None
    column_lse = _empty_float64(scale, m if both_directions else 0)
    for first in range(0, blocks, panel):
        panel_blocks = min(panel, blocks - first)
        contrastive_fwd_kernel[panel_blocks, splits](
            rows,
            columns,
            scale,
            row_rnorm,
            column_rnorm,
            contiguous(row_ids),
            contiguous(column_ids),
            positives,
            positive_logits if positives is not None else None,
            lse,
            row_partial,
            column_partial,
            expectation_partial,
            n,
            m,
            d,
            positives.numel() // n if positives is not None else 0,
            *rows.stride(),
            *columns.stride(),
            first,
            tiles_per_split,
            1 + panel,
            SQUARE=square,
            KEEP_DIAGONAL=keep_diagonal,
            PRECISION=precision(rows),
            EVEN_D=d % tile.block_d == 0,
            ONE_BLOCK_D=d <= tile.block_d,
            **launch_options(tile),
        )
        if both_directions:
            # Slot 0 carries the sums of the panels before.
            first_part = 1 if first == 0 else 0
            last = first + panel_blocks == blocks
            parts = panel_blocks + 1 - first_part
            _merge_lse(column_partial, column_lse if last else None, first_part, parts)
    if row_partial is not None:
        _merge_lse(row_partial, lse, 0, splits)
    if expectation is not None:
        block_n, block_d = 16, min(128, triton.next_power_of_2(d))
        expectation_merge_kernel[triton.cdiv(n, block_n), triton.cdiv(d, block_d)](
            row_partial, expectation_partial, expectation, n, d, splits, BLOCK_N=block_n, BLOCK_D=block_d
        )

    return (
        lse,
        column_lse,
        positive_logits,
        scale.new_empty(0) if row_rnorm is None else row_rnorm,
        scale.new_empty(0) if square or column_rnorm is None else column_rnorm,
        scale.new_empty(0) if expectation is None else expectation,  # logits are recomputed
    )


def contrastive_bwd(
    grad_lse,
    grad_column_lse,
    grad_positive_logits,
    rows,
    columns,
    scale,
    positives,
    row_ids,
    column_ids,
    lse,
    column_lse,
    row_rnorm,
    column_rnorm,
    kept,
    normalize_rows,
    normalize_columns,
    keep_diagonal,
    both_directions,
    rows_need_grad,
    columns_need_grad,
):
    """`contrastive_bwd` of docs/contrastive.md."""
    if kept.dim() == 2:
        return _bwd_from_expectation(
            grad_lse, grad_positive_logits, rows, columns, scale, positives, row_rnorm, column_rnorm, kept,
            normalize_rows, normalize_columns, rows_need_grad,
        )  # fmt: skip
    square = columns is None
    has_positives = positives is not None and grad_positive_logits is not None and positives.numel() > 0
    has_columns = both_directions and grad_column_lse is not None
    if not has_columns:
        grad_column_lse = None
    if not has_positives:
        positives = grad_positive_logits = None
    bound = None
    if rows.dtype == torch.float16:
        bound = _gradient_bound((grad_lse, grad_column_lse, grad_positive_logits), scale)
    if has_positives:
        m = rows.shape[0] if square else columns.shape[0]
        positives = positives.remainder(m).to(torch.int32).reshape(rows.shape[0], -1).contiguous()
        grad_positive_logits = grad_positive_logits if bound is None else grad_positive_logits / bound
        grad_positive_logits = grad_positive_logits.to(scale.dtype).reshape(positives.shape).contiguous()
    row_side = Side(
        rows,
        row_rnorm.contiguous() if normalize_rows else None,
        *_softmax_weight(lse, grad_lse, bound, scale),
        contiguous(row_ids),
        positives,
        grad_positive_logits,
    )
    if square:
        column_side = row_side
    else:
        column_side = Side(
            columns,
            column_rnorm.contiguous() if normalize_columns else None,
            *_softmax_weight(column_lse, grad_column_lse, bound, scale),
            contiguous(column_ids),
            None,
            None,
        )
    masks = {"SQUARE": square, "KEEP_DIAGONAL": keep_diagonal}
    # The row dots of either side give the gradient of scale.
    rows_first = rows_need_grad or square or not columns_need_grad
    both = rows_need_grad and columns_need_grad and not square
    first, second = (row_side, column_side) if rows_first else (column_side, row_side)
    first_grad = rows_need_grad or not rows_first

    if tile_for("backward", rows) is not None:
        grad, row_dots = _bwd_fused(first, second, scale, bound, masks, first_grad)
        other_grad = _bwd_fused(second, first, scale, bound, masks, True)[0] if both else None
    else:
        grad, other_grad, row_dots = _bwd_panels(first, second, scale, bound, masks, first_grad, both)

    empty = [rows.new_empty(0), rows.new_empty(0)]
    grad_scale = row_dots.sum() * 0.5 if square else row_dots.sum()
    by_biases = (scale.new_empty(0), scale.new_empty(0))
    if not first_grad:
        return *empty, grad_scale, *by_biases
    if both:
        return grad, other_grad, grad_scale, *by_biases
    return *((grad, empty[0]) if rows_first else (empty[0], grad)), grad_scale, *by_biases


def _bwd_from_expectation(
    grad_lse, grad_positive_logits, rows, columns, scale, positives, row_rnorm, column_rnorm, expectation,
    normalize_rows, normalize_columns, rows_need_grad,
):  # fmt: skip
    """Gradients of rows and scale where the forward kept the expectation of the columns: no walk over columns."""
    n = rows.shape[0]
    expectation = expectation.contiguous()
    gradient = torch.zeros_like(expectation)
    if grad_lse is not None:
        gradient = grad_lse.to(scale.dtype)[:, None] * expectation
    if positives is not None and grad_positive_logits is not None and positives.numel() > 0:
        index = positives.remainder(columns.shape[0]).reshape(n, -1)
        weight = grad_positive_logits.to(scale.dtype).reshape(index.shape)
        if normalize_columns:
            weight = weight * column_rnorm[index]
        for k in range(index.shape[1]):
            gradient += weight[:, k, None] * columns[index[:, k]].to(scale.dtype)
    grad = torch.empty_like(rows, memory_format=torch.contiguous_format) if rows_need_grad else None
    row_dots = scale.new_empty(n)
    row_rnorm = row_rnorm.contiguous() if normalize_rows else None
    finish_rows(gradient[None], rows, row_rnorm, scale, None, grad, row_dots)
    nothing = (scale.new_empty(0), scale.new_empty(0))
    return rows.new_empty(0) if grad is None else grad, rows.new_empty(0), row_dots.sum(), *nothing


def _bwd_fused(side, other, scale, bound, masks, need_grad):
    """Gradient of one side, in one kernel unless the walk over the other side is split; and its row dots."""
    n, d = side.vectors.shape
    m = other.vectors.shape[0]
    tile = tile_for("backward", side.vectors)
    tiles = triton.cdiv(m, tile.block_m)
    splits, tiles_per_split = split_walk(triton.cdiv(n, tile.block_n), tiles)
    grad = torch.empty_like(side.vectors, memory_format=torch.contiguous_format) if need_grad else None
    row_dots = scale.new_empty(n)
    partial = scale.new_empty(splits, n, d) if splits > 1 else None
    contrastive_bwd_kernel[triton.cdiv(n, tile.block_n), splits](
        *_side_arguments(side),
        *_side_arguments(other),
        scale,
        bound,
        grad,
        row_dots,
        partial,
        n,
        m,
        d,
        _positives_per_row(side, other),
        *side.vectors.stride(),
        *other.vectors.stride(),
        tiles_per_split,
        **masks,
        PRECISION=precision(side.vectors),
        EVEN_D=d == tile.block_d,
        **launch_options(tile),
    )
    if partial is not None:
        finish_rows(partial, side.vectors, side.rnorm, scale, bound, grad, row_dots, has_rnorm=False)
    return grad, row_dots


def _bwd_panels(side, other, scale, bound, masks, need_grad, other_needs_grad):
    """Gradients of one side and, if asked, the other, by panels of stored coefficients; and the row dots."""
    n, d = side.vectors.shape
    m = other.vectors.shape[0]
    tile = tile_for("coefficient", side.vectors)
    norms_in_panel = side.vectors.dtype != torch.float16
    # Rows of 16 elements at least, so that vector accesses stay aligned.
    stride_c = triton.cdiv(m, 16) * 16
    scratch_blocks = SCRATCH_BYTES // (stride_c * side.vectors.element_size() * tile.block_n)
    panel = min(n, max(1, scratch_blocks) * tile.block_n)
    coefficients = side.vectors.new_empty(panel, stride_c)
    grad = torch.empty_like(side.vectors, memory_format=torch.contiguous_format) if need_grad else None
    row_dots = scale.new_empty(n)
    partial = other_partial = None
    for first in range(0, n, panel):
        panel_rows = min(panel, n - first)
        contrastive_coefficient_kernel[triton.cdiv(panel_rows, tile.block_n) * triton.cdiv(m, tile.block_m),](
            *_side_arguments(side),
            *_side_arguments(other),
            scale,
            coefficients,
            n,
            m,
            d,
            _positives_per_row(side, other),
            *side.vectors.stride(),
            *other.vectors.stride(),
            stride_c,
            first,
            panel_rows,
            **masks,
            PRECISION=precision(side.vectors),
            EVEN_D=d % tile.block_d == 0,
            ONE_BLOCK_D=d <= tile.block_d,
            **launch_options(tile),
        )
        panel_coefficients = coefficients[:panel_rows, :m]
        rows = slice(first, first + panel_rows)
        rnorm = None if norms_in_panel else other.rnorm
        partial = _product(panel_coefficients, other.vectors, rnorm, scale, partial, accumulate=False)
        part = Side(side.vectors[rows], None if side.rnorm is None else side.rnorm[rows], *[None] * 5)
        part_grad = None if grad is None else grad[rows]
        finish_rows(
            partial,
            part.vectors,
            part.rnorm,
            scale,
            bound,
            part_grad,
            row_dots[rows],
            has_rnorm=norms_in_panel,
        )
        if other_needs_grad:
            rnorm = None if norms_in_panel else part.rnorm
            other_partial = _product(
                panel_coefficients.T, part.vectors, rnorm, scale, other_partial, accumulate=first > 0
            )
    other_grad = None
    if other_needs_grad:
        other_grad = torch.empty_like(other.vectors, memory_format=torch.contiguous_format)
        finish_rows(
            other_partial,
            other.vectors,
            other.rnorm,
            scale,
            bound,
            other_grad,
            scale.new_empty(m),
            has_rnorm=norms_in_panel,
        )
    return grad, other_grad, row_dots


def _product(a, b, b_rnorm, scale, partial, accumulate):
    """Partial sums (splits, N, D) of a (N, K) @ b (K, D), added to `partial` or in a new tensor."""
    (n, k), d = a.shape, b.shape[1]
    tile = tile_for("product", b)
    owners = triton.cdiv(n, tile.block_n) * triton.cdiv(d, tile.block_d)
    if accumulate:
        splits = partial.shape[0]
        tiles_per_split = triton.cdiv(triton.cdiv(k, tile.block_m), splits)
    else:
        splits, tiles_per_split = split_walk(owners, triton.cdiv(k, tile.block_m))
        partial = scale.new_empty(splits, n, d)
    contrastive_product_kernel[owners, splits](
        a,
        b,
        b_rnorm,
        partial,
        n,
        k,
        d,
        *a.stride(),
        *b.stride(),
        tiles_per_split,
        ACCUMULATE=accumulate,
        PRECISION=precision(b),
        EVEN_D=d % tile.block_d == 0,
        **launch_options(tile),
    )
    return partial


def _merge_lse(partial, lse, first_part, parts):
    _, slots, n = partial.shape
    block_n = 128
    merge_lse_kernel[triton.cdiv(n, block_n),](partial, lse, first_part, parts, slots, n, BLOCK_N=block_n)


def _softmax_weight(lse, grad_lse, bound, scale):
    """lse and its gradient as the tiles take them, see softmax_weight_kernel; (None, None) without one."""
    if grad_lse is None:
        return None, None
    n = lse.shape[0]
    log2_lse, weight = scale.new_empty(2, n)
    block_n = 128
    softmax_weight_kernel[triton.cdiv(n, block_n),](
        lse.contiguous(), grad_lse.contiguous(), bound, log2_lse, weight, n, BLOCK_N=block_n
    )
    return log2_lse, weight


def _gradient_bound(gradients, scale):
    """Largest magnitude of the incoming gradients, 0-d on the device in scale's type, never 0."""
    largest = [grad.abs().amax() for grad in gradients if grad is not None]
    if not largest:
        return None
    return torch.stack(largest).amax().clamp_min(1e-30).to(scale.dtype)


def _empty_float64(like, *shape):
    return torch.empty(*shape, dtype=torch.float64, device=like.device)


def _side_arguments(side):
    return (
        side.vectors,
        side.rnorm,
        side.log2_lse,
        side.weight,
        side.ids,
        side.positives,
        side.grad_positives,
    )


def _positives_per_row(*sides):
    return max(0 if side.positives is None else side.positives.shape[1] for side in sides)
