"""Triton kernels of the forward of `contrastive`, which `contrastive.py` launches."""

import triton
import triton.language as tl

from ssl_kernels.triton.common import (
    LN2,
    LOG2E,
    add_bias,
    column_softmax,
    exclude,
    exclude_above,
    exp2,
    finite_shift,
    has_bounded_logits,
    index_range,
    inner_products,
    load_base2,
    load_index,
    load_tile,
    load_vector,
    natural_lse,
    normalize_tile,
    online_softmax,
    scale_logits,
)


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
    x_bias_ptr,
    y_bias_ptr,
    x_limit_ptr,
    y_exempt_ptr,
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
    ONLY_EQUAL_IDS: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    ONE_BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # x (N, D), y (M, D), s_ij = scale · x_rnorm_i · y_rnorm_j · ⟨x_i, y_j⟩.
    #   lse_i = log Σ_{j allowed} exp(s_ij + y_bias_j);   positive_logits_ik = s_{i, positives(i, k)}
    #   column_partial: Σ_{i allowed} exp(s_ij + x_bias_i) over the rows of each row block, merged by
    #   merge_lse_kernel into column_lse
    # With x_limit, s_ij above x_limit_i are left out too, but for positives of i and exempt j.
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
    # Work: 1 unit = 2·N·M·D flops, N, M and D rounded up to whole blocks; in both directions too, there with two
    #   exponentials an entry in the place of one, unless logits are bounded and the same in both sums: then a
    #   column sums the terms of its rows, each times 2 to the shift of its row.
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
    scale = tl.load(scale_ptr)
    row_scale = tl.full([BLOCK_N], LOG2E, ACC) * scale
    if x_rnorm_ptr is not None:
        row_scale *= tl.load(x_rnorm_ptr + rows, mask=rows < N, other=0.0)
    row_ids = load_vector(x_ids_ptr, rows, N, 0)
    row_bias = load_base2(x_bias_ptr, rows, N)  # Triton 3.6 makes no tuple of two that may be None
    row_limit = load_base2(x_limit_ptr, rows, N)
    if positive_logits_ptr is not None:
        lowest, highest = index_range(positives_ptr, rows, N, M, P)
    HAS_NORMS: tl.constexpr = x_rnorm_ptr is not None and y_rnorm_ptr is not None
    HAS_BIASES: tl.constexpr = x_bias_ptr is not None or y_bias_ptr is not None
    # There are no registers for doubles.
    SHARES_TERMS: tl.constexpr = HAS_NORMS and not HAS_BIASES and ACC != tl.float64
    shares_terms = has_bounded_logits(scale) if SHARES_TERMS else False

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
        if positive_logits_ptr is not None:
            if (lowest < m0 + BLOCK_M) & (highest >= m0):
                store_positive_logits(logits, positives_ptr, positive_logits_ptr, rows, columns, m0, N, M, P)
        column_ids = load_vector(y_ids_ptr, columns, M, 0)
        logits = exclude(logits, row_ids, column_ids, rows, columns, SQUARE, KEEP_DIAGONAL, ONLY_EQUAL_IDS)
        if row_limit is not None:
            logits = exclude_above(
                logits, row_limit, y_exempt_ptr, positives_ptr, rows, columns, N, M, P, ACROSS=False
            )
        column_logits = add_bias(logits, row_bias, ACROSS=False)
        logits = add_bias(logits, load_base2(y_bias_ptr, columns, M), ACROSS=True)
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
            if BLOCK_D <= 128 and x.dtype.primitive_bitwidth == 16:
                # A sum that a product adds to is scaled while the product before is still at it, and ptxas then
                # serialises every wgmma (C7515); the compiler makes such a sum of an addition, but not of an fma.
                part = tl.dot(weights.to(x.dtype), y, out_dtype=ACC, input_precision=PRECISION)
                shrink = tl.broadcast_to(shrink[:, None], [BLOCK_N, BLOCK_D])
                expectation = tl.fma(expectation, shrink, part)
            else:
                expectation *= shrink[:, None]
                expectation = tl.dot(
                    weights.to(x.dtype), y, expectation, out_dtype=ACC, input_precision=PRECISION
                )
        elif column_partial_ptr is None:
            maximum, total, _, _ = online_softmax(maximum, total, logits)
        elif shares_terms:
            maximum, total, terms, shift = online_softmax(maximum, total, logits)
            column_total = tl.sum(terms * tl.where(rows < N, exp2(shift), 0.0)[:, None], axis=0)
            column_maximum = tl.zeros_like(column_total)
        else:
            maximum, total, _, _ = online_softmax(maximum, total, logits)
            inside = tl.where(rows[:, None] < N, column_logits, float("-inf"))
            column_maximum, column_total = column_softmax(inside)
        if column_partial_ptr is not None:
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
