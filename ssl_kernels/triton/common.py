"""Triton building blocks of the losses: tiles, masks, online softmax, row norms, merging of partial results.

Logits are kept in units of log 2 (s' = s · log2 e), so that every exponential is one exp2. Offsets are 64-bit
before a stride multiplies them. ACC is the accumulation type: float32, or float64 for float64 input.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from ssl_kernels import constants

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)
# By tl.full in its dtype: beside a tensor it is float32's.
NORM_EPS: tl.constexpr = tl.constexpr(constants.NORM_EPS)
# Logits of normalised rows up to this, in units of log 2, and the sums of their powers are numbers of float32's range.
MOST_BOUNDED_LOGIT: tl.constexpr = tl.constexpr(32.0)


@triton.jit
def exp2(x):
    """2^x; in float64 without the branches of the library's, on which the lanes of a warp would part."""
    if x.dtype == tl.float64:
        x = tl.where(x > 1100.0, 1100.0, x)
        x = tl.where(x < -1100.0, -1100.0, x)
        whole = tl.floor(x + 0.5)
        z = (x - whole) * LN2  # |z| <= ln 2 / 2, where the series of e^z to z^13 / 13! is exact to 4e-18
        series = tl.full(x.shape, 1.0, tl.float64)
        for k in tl.static_range(13, 0, -1):
            series = 1.0 + series * z * (1.0 / k)
        # 2^whole in two factors, as neither the smallest nor the largest results have room for it in one.
        exponent = whole.to(tl.int64)
        half = exponent >> 1
        low = ((half + 1023) << 52).to(tl.float64, bitcast=True)
        high = ((exponent - half + 1023) << 52).to(tl.float64, bitcast=True)
        result = series * low * high
    else:
        result = tl.exp2(x)
    return result


@triton.jit
def log1p_below_1(x):
    """log(1 + x) of 0 <= x <= 1; in float64 without the branches of the library's."""
    if x.dtype == tl.float64:
        s = x / (2.0 + x)  # log(1 + x) = 2 artanh(s), s <= 1/3: its series to s^35 is exact to 2e-19
        square = s * s
        series = tl.full(x.shape, 0.0, tl.float64)
        for k in tl.static_range(17, -1, -1):
            series = series * square + 1.0 / (2 * k + 1)
        return 2.0 * s * series
    return libdevice.log1p(x)


@triton.jit
def load_tile(ptr, rows, features, N, D, stride_n, stride_d, EVEN_D: tl.constexpr):
    """Tile of a strided (N, D) matrix, shape (rows, features), 0 outside."""
    offsets = rows.to(tl.int64)[:, None] * stride_n + features.to(tl.int64)[None, :] * stride_d
    inside = rows[:, None] < N
    if not EVEN_D:
        inside &= features[None, :] < D
    return tl.load(ptr + offsets, mask=inside, other=0.0)


@triton.jit
def inner_products(
    x,
    x_ptr,
    y_ptr,
    rows,
    columns,
    N,
    M,
    D,
    stride_xn,
    stride_xd,
    stride_yn,
    stride_yd,
    EVEN_D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """⟨x_i, y_j⟩ of a tile, (rows, columns) in ACC. `x` is the tile of all features of the rows, or None.

    A narrower y is widened to x's type.
    """
    features = tl.arange(0, BLOCK_D)
    if x is not None:
        y = load_tile(y_ptr, columns, features, M, D, stride_yn, stride_yd, EVEN_D).to(x.dtype)
        products = tl.dot(x, tl.trans(y), out_dtype=ACC, input_precision=PRECISION)
    else:
        products = tl.zeros([rows.shape[0], columns.shape[0]], ACC)
        for d0 in range(0, D, BLOCK_D):
            x_part = load_tile(x_ptr, rows, d0 + features, N, D, stride_xn, stride_xd, EVEN_D)
            y_part = load_tile(y_ptr, columns, d0 + features, M, D, stride_yn, stride_yd, EVEN_D).to(
                x_part.dtype
            )
            products = tl.dot(x_part, tl.trans(y_part), products, out_dtype=ACC, input_precision=PRECISION)
    return products


@triton.jit
def load_vector(ptr, index, size, OTHER: tl.constexpr):
    """ptr[index] where inside, OTHER outside; None where there is no vector."""
    if ptr is not None:
        vector = tl.load(ptr + index, mask=index < size, other=OTHER)
    else:
        vector = None
    return vector


@triton.jit
def scale_logits(products, row_scale, column_rnorm, columns, M):
    """Logits from inner products: a factor for each row, the column's 1 / norm where columns are normalised.

    Columns from M on become -inf, in the addition of a fused multiply-add.
    """
    logits = products * row_scale[:, None]
    if column_rnorm is not None:
        logits *= column_rnorm[None, :]
    outside = tl.where(columns < M, 0.0, float("-inf")).to(logits.dtype)
    return logits + outside[None, :]


@triton.jit
def exclude(
    logits,
    row_ids,
    column_ids,
    rows,
    columns,
    SQUARE: tl.constexpr,
    KEEP_DIAGONAL: tl.constexpr,
    ONLY_EQUAL_IDS: tl.constexpr = False,
):
    """Sets what is left out of the sums to -inf: equal (or all other) ids, and the diagonal in the square case."""
    if row_ids is not None:
        if ONLY_EQUAL_IDS:
            excluded = row_ids[:, None] != column_ids[None, :]
        else:
            excluded = row_ids[:, None] == column_ids[None, :]
        if SQUARE:
            excluded |= rows[:, None] == columns[None, :]
        elif KEEP_DIAGONAL:
            excluded &= rows[:, None] != columns[None, :]
        logits = tl.where(excluded, float("-inf"), logits)
    elif SQUARE:
        logits = tl.where(rows[:, None] == columns[None, :], float("-inf"), logits)
    return logits


@triton.jit
def load_base2(ptr, index, size):
    """Biases or limits of logits in the units of these, 0 outside; None where there are none."""
    if ptr is not None:
        vector = LOG2E * tl.load(ptr + index, mask=index < size, other=0.0)
    else:
        vector = None
    return vector


@triton.jit
def along(vector, ACROSS: tl.constexpr):
    """A value for each row of a tile, or with ACROSS for each column, as broadcasting takes it."""
    return vector[None, :] if ACROSS else vector[:, None]


@triton.jit
def exclude_above(
    logits, limit, exempt_ptr, positives_ptr, owners, others, owner_count, other_count, P, ACROSS: tl.constexpr
):  # fmt: skip
    """Sets logits above the limit of their owner to -inf, but for its positives and for others that are exempt.

    Owners, with `limit` and positives (owner_count, P), are the rows of the tile or with ACROSS its columns. NaN stays.
    """
    above = logits > along(limit, ACROSS)
    if exempt_ptr is not None:
        exempt = tl.load(exempt_ptr + others, mask=others < other_count, other=0)
        above &= along(exempt, not ACROSS) == 0
    if positives_ptr is not None:
        for k in range(P):
            index = load_index(positives_ptr, owners, k, owner_count, other_count, P)
            above &= along(index, ACROSS) != along(others, not ACROSS)
    return tl.where(above, float("-inf"), logits)


@triton.jit
def add_bias(logits, bias, ACROSS: tl.constexpr):
    """Adds the bias of each row, or with ACROSS of each column, to what is not left out; None: as it is."""
    if bias is not None:
        logits = tl.where(logits == float("-inf"), logits, logits + along(bias, ACROSS))
    return logits


@triton.jit
def finite_shift(maximum):
    """The maximum to subtract before exp2; 0 where it is infinite, so that no shift makes inf - inf."""
    return tl.where(tl.abs(maximum) == float("inf"), 0.0, maximum)


@triton.jit
def has_bounded_logits(scale):
    """Whether 2^s' of every logit of normalised rows may be taken as it is, whatever the maximum: 0-d, NaN is not."""
    return tl.abs(scale * LOG2E) <= MOST_BOUNDED_LOGIT


@triton.jit
def online_softmax(maximum, total, logits):
    """Takes the rows of `logits` into the running maximum and sum of exp2 (arXiv:1805.02867).

    Returns (maximum, total, terms, shift): what was summed, exp2(logits - shift), too.
    """
    new_maximum = tl.maximum(maximum, tl.max(logits, axis=1))
    shift = finite_shift(new_maximum)
    total *= exp2(maximum - shift)
    terms = exp2(logits - shift[:, None])
    return new_maximum, total + tl.sum(terms, axis=1), terms, shift


@triton.jit
def column_softmax(logits):
    """Maximum over the rows of a tile for each of its columns, and the sum of exp2 below it."""
    maximum = tl.max(logits, axis=0)
    total = tl.sum(exp2(logits - finite_shift(maximum)[None, :]), axis=0)
    return maximum, total


@triton.jit
def natural_lse(maximum, total):
    """Log-sum-exp of a running maximum and sum, float64, natural units; -inf where nothing was taken in."""
    return LN2 * (finite_shift(maximum).to(tl.float64) + tl.log2(total.to(tl.float64)))


@triton.jit
def row_inner_products(x, y, inside):
    """Σ_d x_id y_id; `inside` (N, 1) or (N, D) a mask known at run time only.

    The selection keeps the products from being fused into the additions between lanes that follow: each lane
    would round its own product less than its neighbour's, and lanes with the same sum differ in its last bit.
    """
    return tl.sum(tl.where(inside, x * y, 0.0), axis=1)


@triton.jit
def load_index(index_ptr, rows, k, N, M, P):
    """Entry k of the indices (N, P) of each row into M columns; negative ones count from the end."""
    index = tl.load(index_ptr + rows.to(tl.int64) * P + k, mask=rows < N, other=0)
    return tl.where(index < 0, index + M, index)


@triton.jit
def index_range(index_ptr, rows, N, M, P):
    """Smallest and largest index of these rows, so that most tiles can skip looking for them."""
    lowest = tl.full(rows.shape, 0x7FFFFFFF, tl.int64)
    highest = tl.full(rows.shape, -1, tl.int64)
    for k in range(P):
        index = load_index(index_ptr, rows, k, N, M, P)
        lowest = tl.minimum(lowest, index)
        highest = tl.maximum(highest, index)
    return tl.min(lowest, axis=0), tl.max(highest, axis=0)


@triton.jit(do_not_specialize=["N"])
def row_rnorm_kernel(
    x_ptr,
    rnorm_ptr,
    N,
    D,
    stride_xn,
    stride_xd,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # rnorm_i = 1 / max(‖x_i‖₂, 1e-12), as F.normalize bounds it. x (N, D) is read once; products and sum in
    # the type of rnorm.
    ACC: tl.constexpr = rnorm_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    squared_norm = tl.zeros([BLOCK_N], ACC)
    for d0 in range(0, D, BLOCK_D):
        x = load_tile(x_ptr, rows, d0 + tl.arange(0, BLOCK_D), N, D, stride_xn, stride_xd, False).to(ACC)
        squared_norm += row_inner_products(x, x, rows[:, None] < N)
    rnorm = 1.0 / tl.maximum(tl.sqrt(squared_norm), tl.full([], NORM_EPS, ACC))
    tl.store(rnorm_ptr + rows, rnorm, mask=rows < N)


@triton.jit(do_not_specialize=["first_part", "parts", "slots", "N"])
def merge_lse_kernel(
    partial_ptr,
    lse_ptr,
    first_part,
    parts,
    slots,
    N,
    BLOCK_N: tl.constexpr,
):
    # lse_i = log Σ_part total_part,i 2^(maximum_part,i) over the parts first_part + [0, parts) of partial
    # (2, slots, N): maxima, in units of log 2, then sums. Written in float64 and natural units to lse, or,
    # where that is None, as a maximum and sum to slot 0, to be merged again.
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ACC: tl.constexpr = partial_ptr.dtype.element_ty
    maximum = tl.full([BLOCK_N], float("-inf"), ACC)
    total = tl.zeros([BLOCK_N], ACC)
    for part in range(first_part, first_part + parts):
        pointers = partial_ptr + part.to(tl.int64) * N + rows
        part_maximum = tl.load(pointers, mask=rows < N, other=float("-inf"))
        part_total = tl.load(pointers + slots.to(tl.int64) * N, mask=rows < N, other=0.0)
        new_maximum = tl.maximum(maximum, part_maximum)
        shift = finite_shift(new_maximum)
        total = total * exp2(maximum - shift) + part_total * exp2(part_maximum - shift)
        maximum = new_maximum
    if lse_ptr is not None:
        tl.store(lse_ptr + rows, natural_lse(maximum, total), mask=rows < N)
    else:
        tl.store(partial_ptr + rows, maximum, mask=rows < N)
        tl.store(partial_ptr + slots.to(tl.int64) * N + rows, total, mask=rows < N)


@triton.jit
def normalize_tile(tile, rnorm_ptr, index, size, ACC: tl.constexpr):
    """Rows of a tile times their 1 / norm, rounded back to storage type."""
    rnorm = tl.load(rnorm_ptr + index, mask=index < size, other=0.0)
    return (tile.to(ACC) * rnorm[:, None]).to(tile.dtype)


@triton.jit
def through_norm(gradient, x, rnorm, row_dot):
    """Gradient of x from that of x̂ = x · rnorm, row_dot = ⟨x̂, gradient⟩; x̂ is linear below the norm bound."""
    projected = gradient - x * (rnorm * row_dot)[:, None]
    # 1e12 rounded to float32 is one of the values that a norm at the bound can give, hence the margin.
    return rnorm[:, None] * tl.where((rnorm < 0.999999e12)[:, None], projected, gradient)


@triton.jit(do_not_specialize=["N", "splits"])
def finish_rows_kernel(
    partial_ptr,
    x_ptr,
    x_rnorm_ptr,
    scale_ptr,
    bound_ptr,
    grad_ptr,
    row_dots_ptr,
    N,
    D,
    stride_xn,
    stride_xd,
    splits,
    HAS_RNORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # From the gradient g = Σ_split partial (splits, N, D) of scale · x̂: row_dots_i = ⟨x̂_i, g_i⟩ and grad_i =
    # d(x̂_i)/d(x_i) · scale · g_i. HAS_RNORM: the partial sums carry a factor x_rnorm_i, taken out here.
    # Traffic: reads partial and x twice, writes N·D elements.
    ACC: tl.constexpr = scale_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = tl.load(scale_ptr)
    x_rnorm = load_vector(x_rnorm_ptr, rows, N, 1.0)
    factor = tl.full([BLOCK_N], 1.0, ACC)
    if bound_ptr is not None:
        factor *= tl.load(bound_ptr)
    if HAS_RNORM:
        factor /= x_rnorm

    row_dots = tl.zeros([BLOCK_N], ACC)
    for d0 in range(0, D, BLOCK_D):
        features = d0 + tl.arange(0, BLOCK_D)
        gradient = tl.zeros([BLOCK_N, BLOCK_D], ACC)
        for split in range(splits):
            base = partial_ptr + split.to(tl.int64) * N * D
            gradient += load_tile(base, rows, features, N, D, D, 1, False)
        x = load_tile(x_ptr, rows, features, N, D, stride_xn, stride_xd, False).to(ACC)
        row_dots += row_inner_products(x, gradient * factor[:, None], rows[:, None] < N)
    if x_rnorm is not None:
        row_dots *= x_rnorm
    tl.store(row_dots_ptr + rows, row_dots, mask=rows < N)

    if grad_ptr is not None:
        for d0 in range(0, D, BLOCK_D):
            features = d0 + tl.arange(0, BLOCK_D)
            gradient = tl.zeros([BLOCK_N, BLOCK_D], ACC)
            for split in range(splits):
                base = partial_ptr + split.to(tl.int64) * N * D
                gradient += load_tile(base, rows, features, N, D, D, 1, False)
            gradient *= factor[:, None]
            if x_rnorm is not None:
                x = load_tile(x_ptr, rows, features, N, D, stride_xn, stride_xd, False).to(ACC)
                gradient = through_norm(gradient, x, x_rnorm, row_dots)
            offsets = rows.to(tl.int64)[:, None] * D + features[None, :]
            inside = (rows[:, None] < N) & (features[None, :] < D)
            tl.store(grad_ptr + offsets, (scale * gradient).to(grad_ptr.dtype.element_ty), mask=inside)
