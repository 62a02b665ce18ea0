"""Triton kernel of `batch_hard`; docs/batch_hard.md is the contract. Tiles are those of `contrastive`'s forward."""

import torch
import triton
import triton.language as tl

from ssl_kernels.triton.common import inner_products, load_tile, load_vector
from ssl_kernels.triton.launch import (
    aligned,
    launch_options,
    precision,
    register_limit,
    row_rnorm_of,
    split_walk,
    tile_for,
    unsupported_operands,
)


@triton.jit
def ordered(key):
    """Integers as wide as `key` in its order, NaN above all, all above the smallest; zeros of both signs alike."""
    key = tl.where(key == 0.0, 0.0, key)
    if key.dtype == tl.float64:
        bits = key.to(tl.int64, bitcast=True)
        order = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
        order = tl.where(key != key, 0x7FFFFFFFFFFFFFFF, order)
    else:
        bits = key.to(tl.int32, bitcast=True)
        order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        order = tl.where(key != key, 0x7FFFFFFF, order)
    return order


@triton.jit
def take_largest(best, index, order, candidates, columns, NONE: tl.constexpr):
    """The largest candidate of each row of a tile into the best before; the lowest column of equal ones."""
    order = tl.where(candidates, order, NONE)
    largest = tl.max(order, axis=1)
    column = tl.min(tl.where(order == largest[:, None], columns[None, :], 0x7FFFFFFF), axis=1)
    index = tl.where(largest > best, column, index)
    return tl.maximum(best, largest), index


@triton.jit(do_not_specialize=["N", "tiles_per_split"])
def batch_hard_kernel(
    x_ptr,
    rnorm_ptr,
    half_square_ptr,
    labels_ptr,
    partial_ptr,
    N,
    D,
    stride_xn,
    stride_xd,
    tiles_per_split,
    NONE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    ONE_BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # k_ij = |x̂_j|² / 2 - ⟨x̂_i, x̂_j⟩, without the first term where half_square is None (cosine).
    #   positive_i = argmax k_ij over j != i of i's label;  negative_i = argmax -k_ij over j of another label
    # partial (4, splits, N) int64: order and index of the positive, order and index of the negative; order is NONE
    # where there is no candidate.
    # Tiling: a program owns BLOCK_N rows and walks the columns of its split BLOCK_M at a time in ascending order, the
    #   best two of each row with their indices in registers.
    # Traffic: with B = ceil(N / BLOCK_N), x is read B times as columns (mostly from L2), and once a split as rows or,
    #   without ONE_BLOCK_D, ceil(N / BLOCK_M) times. Writes 32·N·splits bytes.
    # Work: 1 unit = 2·N·N·D flops, in whole blocks. Numerics: products of stored x accumulated in ACC.
    ACC: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    ORDER: tl.constexpr = tl.int64 if ACC == tl.float64 else tl.int32
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if ONE_BLOCK_D:
        x = load_tile(x_ptr, rows, tl.arange(0, BLOCK_D), N, D, stride_xn, stride_xd, EVEN_D)
    else:
        x = None
    row_rnorm = load_vector(rnorm_ptr, rows, N, 0.0)
    row_labels = tl.load(labels_ptr + rows, mask=rows < N, other=0)
    positive = tl.full([BLOCK_N], NONE, ORDER)
    negative = tl.full([BLOCK_N], NONE, ORDER)
    positive_index = tl.full([BLOCK_N], -1, tl.int32)
    negative_index = tl.full([BLOCK_N], -1, tl.int32)
    start = split * tiles_per_split * BLOCK_M
    stop = min(N, start + tiles_per_split * BLOCK_M)
    for m0 in range(start, stop, BLOCK_M):
        columns = m0 + tl.arange(0, BLOCK_M)
        products = inner_products(
            x, x_ptr, x_ptr, rows, columns, N, N, D, stride_xn, stride_xd, stride_xn, stride_xd,
            EVEN_D, BLOCK_D, ACC, PRECISION,
        )  # fmt: skip
        if rnorm_ptr is not None:
            products *= row_rnorm[:, None] * load_vector(rnorm_ptr, columns, N, 0.0)[None, :]
        key = -products
        if half_square_ptr is not None:
            key += load_vector(half_square_ptr, columns, N, 0.0)[None, :]
        labels = tl.load(labels_ptr + columns, mask=columns < N, other=0)
        same = row_labels[:, None] == labels[None, :]
        inside = (columns < N)[None, :]
        itself = rows[:, None] == columns[None, :]
        positive, positive_index = take_largest(
            positive, positive_index, ordered(key), same & inside & (itself == 0), columns, NONE
        )
        negative, negative_index = take_largest(
            negative, negative_index, ordered(-key), (same == 0) & inside, columns, NONE
        )

    pointers = partial_ptr + split.to(tl.int64) * N + rows
    plane = tl.num_programs(1).to(tl.int64) * N
    tl.store(pointers, positive.to(tl.int64), mask=rows < N)
    tl.store(pointers + plane, positive_index.to(tl.int64), mask=rows < N)
    tl.store(pointers + 2 * plane, negative.to(tl.int64), mask=rows < N)
    tl.store(pointers + 3 * plane, negative_index.to(tl.int64), mask=rows < N)


def unsupported(embeddings, *_, **__):
    """Why this backend cannot run a call, or None if it can."""
    return unsupported_operands(embeddings)


def batch_hard(embeddings, labels, normalize, distance):
    """`batch_hard` of docs/batch_hard.md."""
    n, d = embeddings.shape
    acc = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    rnorm = row_rnorm_of(embeddings, embeddings.new_empty((), dtype=acc)) if normalize else None
    half_square = None
    if distance == "euclidean":
        used = embeddings.to(acc) if rnorm is None else embeddings.to(acc) * rnorm[:, None]
        half_square = used.square().sum(1) / 2
    embeddings = aligned(embeddings, n * n)
    d = embeddings.shape[1]
    none = torch.iinfo(torch.int64 if acc == torch.float64 else torch.int32).min
    tile = tile_for("forward", embeddings)
    blocks, tiles = triton.cdiv(n, tile.block_n), triton.cdiv(n, tile.block_m)
    splits, tiles_per_split = split_walk(blocks, tiles)
    options = launch_options(tile)
    if precision(embeddings) == "tf32":
        # Left to itself, the compiler spills 8 bytes for a third block per multiprocessor on 8.6.
        options["maxnreg"] = register_limit(tile)
    partial = labels.new_empty(4, splits, n)
    batch_hard_kernel[blocks, splits](
        embeddings,
        rnorm,
        half_square,
        labels.contiguous(),
        partial,
        n,
        d,
        *embeddings.stride(),
        tiles_per_split,
        NONE=none,
        PRECISION=precision(embeddings),
        EVEN_D=d % tile.block_d == 0,
        ONE_BLOCK_D=d <= tile.block_d,
        **options,
    )
    return _merged(*partial[:2]), _merged(*partial[2:])


def _merged(order, index):
    """Index of the largest order over the splits, (splits, N); the lowest of equal ones, -1 where all are NONE."""
    largest = order.amax(0)
    return index.masked_fill(order != largest, torch.iinfo(torch.int64).max).amin(0)
