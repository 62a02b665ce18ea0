"""Triton kernels of the backward of `contrastive`, which `contrastive.py` launches."""

import triton
import triton.language as tl

from ssl_kernels.triton.common import (
    LOG2E,
    add_bias,
    exclude,
    exclude_above,
    exp2,
    has_bounded_logits,
    inner_products,
    load_base2,
    load_tile,
    load_vector,
    normalize_tile,
    row_inner_products,
    scale_logits,
    through_norm,
)


@triton.jit(do_not_specialize=["N"])
def softmax_weight_kernel(
    lse_ptr, grad_ptr, bound_ptr, scale_ptr, log2_lse_ptr, weight_ptr, N,
    SHARED_FACTOR: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # grad_i exp(s - lse_i) = weight_i 2^(s' - log2_lse_i) with s' = s · log2 e: log2_lse_i is lse_i · log2 e
    # rounded to its type, weight_i takes the rounding and 1 / bound. lse_i = -inf (nothing was allowed) gives
    # +inf, hence 0 later. Where one exponential per entry does for both sides weight_i is
    # SHARED_FACTOR grad_i 2^-log2_lse_i, unrounded, and 0 where nothing was allowed.
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    exact = LOG2E * tl.load(lse_ptr + rows, mask=rows < N, other=0.0)
    weight = tl.load(grad_ptr + rows, mask=rows < N, other=0.0)
    if bound_ptr is not None:
        weight /= tl.load(bound_ptr).to(tl.float64)
    rounded = exact.to(log2_lse_ptr.dtype.element_ty)
    empty = exact == float("-inf")
    factor = tl.where(empty, 1.0, exp2((rounded.to(tl.float64) - exact).to(tl.float32)).to(tl.float64))
    if SHARED_FACTOR is not None:
        shared = tl.where(empty, 0.0, SHARED_FACTOR * exp2(-exact))
        factor = tl.where(has_bounded_logits(tl.load(scale_ptr)), shared, factor)
    weight *= factor
    tl.store(log2_lse_ptr + rows, tl.where(empty, float("inf"), rounded), mask=rows < N)
    tl.store(weight_ptr + rows, weight.to(weight_ptr.dtype.element_ty), mask=rows < N)


@triton.jit
def logits_of_sums(
    logits, x_bias, x_limit, x_exempt_ptr, x_positives_ptr, y_bias, y_limit, y_exempt_ptr, y_positives_ptr,
    rows, columns, N, M, P, SQUARE: tl.constexpr,
):  # fmt: skip
    """(row_logits, column_logits): a tile as the sums over y of its rows take it, and those over x of its columns.

    The side with a limit is that of the operator's rows: what it leaves out stays out of both sums. In the square case
    that is either side, and each leaves out of its own sums.
    """
    row_logits, column_logits = logits, logits
    if x_limit is not None:
        row_logits = exclude_above(
            logits, x_limit, y_exempt_ptr, x_positives_ptr, rows, columns, N, M, P, ACROSS=False
        )
        column_logits = row_logits
    if y_limit is not None:
        column_logits = exclude_above(
            logits, y_limit, x_exempt_ptr, y_positives_ptr, columns, rows, M, N, P, ACROSS=True
        )
        if not SQUARE:
            row_logits = column_logits
    return add_bias(row_logits, y_bias, ACROSS=True), add_bias(column_logits, x_bias, ACROSS=False)


@triton.jit
def softmax_coefficients(row_logits, column_logits, row_lse, row_weight, column_lse, column_weight):
    """row_weight_i 2^(s'_ij - row_lse_i) + column_weight_j 2^(s'_ij - column_lse_j); None: no such side."""
    if row_lse is not None:
        coefficients = row_weight[:, None] * exp2(row_logits - row_lse[:, None])
        if column_lse is not None:
            coefficients += column_weight[None, :] * exp2(column_logits - column_lse[None, :])
    elif column_lse is not None:
        coefficients = column_weight[None, :] * exp2(column_logits - column_lse[None, :])
    else:
        coefficients = tl.zeros(row_logits.shape, row_logits.dtype)
    return coefficients


@triton.jit
def add_row_positives(coefficients, positives_ptr, grad_ptr, factor, rows, columns, N, P: tl.constexpr):
    """Adds factor · grad_ik at (i, positives(i, k)) for the rows of the tile.

    Every tile compares: behind a branch on whether the tile has any, the compiler spills the accumulator.
    """
    for k in tl.static_range(P):
        offsets = rows.to(tl.int64) * P + k
        index = tl.load(positives_ptr + offsets, mask=rows < N, other=-1)
        grad = factor * tl.load(grad_ptr + offsets, mask=rows < N, other=0.0)
        coefficients += tl.where(index[:, None] == columns[None, :], grad[:, None], 0.0)
    return coefficients


@triton.jit
def add_column_positives(coefficients, positives_ptr, grad_ptr, factor, rows, columns, M, P: tl.constexpr):
    """Adds factor · grad_jk at (positives(j, k), j) for the columns of the tile."""
    for k in tl.static_range(P):
        offsets = columns.to(tl.int64) * P + k
        index = tl.load(positives_ptr + offsets, mask=columns < M, other=-1)
        grad = factor * tl.load(grad_ptr + offsets, mask=columns < M, other=0.0)
        coefficients += tl.where(index[None, :] == rows[:, None], grad[None, :], 0.0)
    return coefficients


@triton.jit(do_not_specialize=["N", "M", "tiles_per_split"])
def contrastive_bwd_kernel(
    x_ptr,
    x_rnorm_ptr,
    x_lse_ptr,
    x_weight_ptr,
    x_ids_ptr,
    x_bias_ptr,
    x_limit_ptr,
    x_exempt_ptr,
    x_positives_ptr,
    x_grad_positives_ptr,
    y_ptr,
    y_rnorm_ptr,
    y_lse_ptr,
    y_weight_ptr,
    y_ids_ptr,
    y_bias_ptr,
    y_limit_ptr,
    y_exempt_ptr,
    y_positives_ptr,
    y_grad_positives_ptr,
    scale_ptr,
    bound_ptr,
    grad_ptr,
    row_dots_ptr,
    partial_ptr,
    bias_partial_ptr,
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
    ONLY_EQUAL_IDS: tl.constexpr,
    SHARED_FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Gradient of the rows x (N, D) of one side; the other side is y (M, D). Called with rows and columns,
    # with both exchanged, or in the square case with the same side twice. With s as in the forward kernel,
    #   C_ij = allowed_ij (x_weight_i 2^(s'_ij + y_bias_j - x_lse_i) + y_weight_j 2^(s'_ij + x_bias_i - y_lse_j))
    #          + Σ_k [x_positives(i, k) = j] x_grad_positives_ik
    #          + Σ_k [y_positives(j, k) = i] y_grad_positives_jk
    #   g_i = Σ_j C_ij ŷ_j;   row_dots_i = ⟨x̂_i, g_i⟩;   grad_i = d(x̂_i)/d(x_i) · scale · g_i
    # Square: C is A + Aᵀ, symmetric, so this one product is the whole gradient.
    # Exponentials: two per entry where both sides have sums, but one with SHARED_FACTOR and bounded logits: C_ij is
    #   2^s'_ij (x_weight_i + y_weight_j) and positives, all times SHARED_FACTOR, which g_i is rid of at the end.
    # Biases: bias_partial (splits, N) takes Σ_j of the second term, the gradient of x_bias.
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
    x_bias = load_base2(x_bias_ptr, rows, N)
    x_limit = load_base2(x_limit_ptr, rows, N)

    factor = tl.full([], 1.0, ACC)
    if SHARED_FACTOR is not None:
        shares_exponential = has_bounded_logits(scale)
        factor = tl.where(shares_exponential, SHARED_FACTOR, factor)
    gradient = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    if bias_partial_ptr is not None:
        bias_gradient = tl.zeros([BLOCK_N], ACC)
    start = split * tiles_per_split * BLOCK_M
    stop = min(M, start + tiles_per_split * BLOCK_M)
    for m0 in range(start, stop, BLOCK_M):
        columns = m0 + tl.arange(0, BLOCK_M)
        y = load_tile(y_ptr, columns, features, M, D, stride_yn, stride_yd, EVEN_D)
        products = tl.dot(x, tl.trans(y), out_dtype=ACC, input_precision=PRECISION)
        y_rnorm = load_vector(y_rnorm_ptr, columns, M, 0.0)
        logits = scale_logits(products, row_scale, y_rnorm, columns, M)
        y_ids = load_vector(y_ids_ptr, columns, M, 0)
        logits = exclude(logits, x_ids, y_ids, rows, columns, SQUARE, KEEP_DIAGONAL, ONLY_EQUAL_IDS)
        row_logits, column_logits = logits_of_sums(
            logits, x_bias, x_limit, x_exempt_ptr, x_positives_ptr, load_base2(y_bias_ptr, columns, M),
            load_base2(y_limit_ptr, columns, M), y_exempt_ptr, y_positives_ptr, rows, columns, N, M, P, SQUARE,
        )  # fmt: skip
        # Before the branch: what is loaded behind it would be waited for once more, at another barrier.
        coefficients = tl.zeros([BLOCK_N, BLOCK_M], ACC)
        if x_grad_positives_ptr is not None:
            coefficients = add_row_positives(
                coefficients, x_positives_ptr, x_grad_positives_ptr, factor, rows, columns, N, P
            )
        if y_grad_positives_ptr is not None:
            coefficients = add_column_positives(
                coefficients, y_positives_ptr, y_grad_positives_ptr, factor, rows, columns, M, P
            )
        y_lse = load_vector(y_lse_ptr, columns, M, 0.0)
        y_weight = load_vector(y_weight_ptr, columns, M, 0.0)
        if SHARED_FACTOR is None:
            of_sums = softmax_coefficients(row_logits, column_logits, x_lse, x_weight, y_lse, y_weight)
        elif shares_exponential:
            of_sums = exp2(row_logits) * (x_weight[:, None] + y_weight[None, :])
        else:
            of_sums = softmax_coefficients(row_logits, column_logits, x_lse, x_weight, y_lse, y_weight)
        coefficients += of_sums
        if bias_partial_ptr is not None:
            of_columns = softmax_coefficients(row_logits, column_logits, None, None, y_lse, y_weight)
            bias_gradient += tl.sum(of_columns, axis=1)
        if y_rnorm is not None:
            if x.dtype == tl.float16:
                y = normalize_tile(y, y_rnorm_ptr, columns, M, ACC)
            else:
                coefficients *= y_rnorm[None, :]
        gradient = tl.dot(coefficients.to(x.dtype), y, gradient, out_dtype=ACC, input_precision=PRECISION)

    if SHARED_FACTOR is not None:
        gradient *= tl.where(shares_exponential, 1.0 / SHARED_FACTOR, 1.0)
    inside = rows[:, None] < N
    if not EVEN_D:
        inside &= features[None, :] < D
    offsets = rows.to(tl.int64)[:, None] * D + features[None, :]
    if bias_partial_ptr is not None:
        tl.store(bias_partial_ptr + split.to(tl.int64) * N + rows, bias_gradient, mask=rows < N)
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
    x_bias_ptr,
    x_limit_ptr,
    x_exempt_ptr,
    x_positives_ptr,
    x_grad_positives_ptr,
    y_ptr,
    y_rnorm_ptr,
    y_lse_ptr,
    y_weight_ptr,
    y_ids_ptr,
    y_bias_ptr,
    y_limit_ptr,
    y_exempt_ptr,
    y_positives_ptr,
    y_grad_positives_ptr,
    scale_ptr,
    coefficient_ptr,
    x_bias_partial_ptr,
    y_bias_partial_ptr,
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
    ONLY_EQUAL_IDS: tl.constexpr,
    SHARED_FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    ONE_BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # C_ij of contrastive_bwd_kernel for the rows first_row + [0, panel_rows), stored, where D is too wide for an
    # accumulator: panels.py multiplies it. With norms, and unless the type is float16, what is stored is
    # x_rnorm_i C_ij y_rnorm_j, so that either product takes its other operand as it lies in memory.
    # Tiling: one BLOCK_N × BLOCK_M tile a program, row blocks of the panel first, so that they share y in L2.
    # Traffic: reads ceil(M / BLOCK_M) times the panel of x and ceil(panel_rows / BLOCK_N) times y; writes
    #   panel_rows · M elements.
    # Biases: x_bias_partial (column blocks, panel_rows) and y_bias_partial (row blocks, M) take the sums of the second
    #   term along the rows of a tile and of the first along its columns: the gradients of x_bias and y_bias.
    # Work: 1 unit over all panels; exponentials as contrastive_bwd_kernel, where x_rnorm_i takes SHARED_FACTOR away.
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
    scale = tl.load(scale_ptr)
    row_scale = tl.full([BLOCK_N], LOG2E, ACC) * scale
    if x_rnorm is not None:
        row_scale *= x_rnorm
    logits = scale_logits(products, row_scale, y_rnorm, columns, M)
    x_ids = load_vector(x_ids_ptr, rows, N, 0)
    y_ids = load_vector(y_ids_ptr, columns, M, 0)
    logits = exclude(logits, x_ids, y_ids, rows, columns, SQUARE, KEEP_DIAGONAL, ONLY_EQUAL_IDS)
    row_logits, column_logits = logits_of_sums(
        logits, load_base2(x_bias_ptr, rows, N), load_base2(x_limit_ptr, rows, N), x_exempt_ptr, x_positives_ptr,
        load_base2(y_bias_ptr, columns, M), load_base2(y_limit_ptr, columns, M), y_exempt_ptr, y_positives_ptr,
        rows, columns, N, M, P, SQUARE,
    )  # fmt: skip
    x_lse = load_vector(x_lse_ptr, rows, N, 0.0)  # Triton 3.6 makes no tuple of two that may be None
    x_weight = load_vector(x_weight_ptr, rows, N, 0.0)
    y_weight = load_vector(y_weight_ptr, columns, M, 0.0)
    factor = tl.full([], 1.0, ACC)
    if SHARED_FACTOR is not None:
        shares_exponential = has_bounded_logits(scale)
        factor = tl.where(shares_exponential, SHARED_FACTOR, factor)
    if SHARED_FACTOR is None:
        y_lse = load_vector(y_lse_ptr, columns, M, 0.0)
        coefficients = softmax_coefficients(row_logits, column_logits, x_lse, x_weight, y_lse, y_weight)
    elif shares_exponential:
        coefficients = exp2(row_logits) * (x_weight[:, None] + y_weight[None, :])
    else:
        y_lse = load_vector(y_lse_ptr, columns, M, 0.0)
        coefficients = softmax_coefficients(row_logits, column_logits, x_lse, x_weight, y_lse, y_weight)
    if x_bias_partial_ptr is not None:
        of_columns = softmax_coefficients(row_logits, column_logits, None, None, y_lse, y_weight)
        column_block = (tl.program_id(0) // row_blocks).to(tl.int64)
        panel = panel_row + tl.arange(0, BLOCK_N)
        pointers = x_bias_partial_ptr + column_block * panel_rows + panel
        tl.store(pointers, tl.sum(of_columns, axis=1), mask=panel < panel_rows)
    if y_bias_partial_ptr is not None:
        of_rows = softmax_coefficients(row_logits, column_logits, x_lse, x_weight, None, None)
        of_rows = tl.where(rows[:, None] < N, of_rows, 0.0)
        pointers = y_bias_partial_ptr + (tl.program_id(0) % row_blocks).to(tl.int64) * M + columns
        tl.store(pointers, tl.sum(of_rows, axis=0), mask=columns < M)
    if x_grad_positives_ptr is not None:
        coefficients = add_row_positives(
            coefficients, x_positives_ptr, x_grad_positives_ptr, factor, rows, columns, N, P
        )
    if y_grad_positives_ptr is not None:
        coefficients = add_column_positives(
            coefficients, y_positives_ptr, y_grad_positives_ptr, factor, rows, columns, M, P
        )
    if coefficient_ptr.dtype.element_ty != tl.float16:
        if SHARED_FACTOR is not None:
            x_rnorm *= tl.where(shares_exponential, 1.0 / SHARED_FACTOR, 1.0)
        if x_rnorm is not None:
            coefficients *= x_rnorm[:, None]
        if y_rnorm is not None:
            coefficients *= y_rnorm[None, :]

    panel = panel_row + tl.arange(0, BLOCK_N)
    offsets = panel.to(tl.int64)[:, None] * stride_c + columns[None, :]
    # To the end of the padded row, a multiple of 16: past M too, so that 16 bytes are stored at a time.
    inside = (panel[:, None] < panel_rows) & (columns[None, :] < stride_c)
    tl.store(coefficient_ptr + offsets, coefficients.to(coefficient_ptr.dtype.element_ty), mask=inside)
