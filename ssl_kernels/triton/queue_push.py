"""Triton kernels of `queue_push_`; docs/moco.md is the contract."""

import torch
import triton
import triton.language as tl

from ssl_kernels.triton.common import NORM_EPS


@triton.jit
def wrap(index, size):
    """The row that `index` names in a ring of `size`, for any index."""
    index %= size
    return tl.where(index < 0, index + size, index)


@triton.jit(do_not_specialize=["K", "B", "first"])
def queue_push_kernel(
    storage_ptr,
    keys_ptr,
    position_ptr,
    K,
    B,
    first,
    D,
    stride_kb,
    stride_kd,
    NORMALIZE: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # storage[(position + b) mod K] = k̂_b for b = first + program, k̂ = k / max(‖k‖₂, 1e-12), or k.
    # Traffic: reads a key once from memory (normalised ones again from cache), writes a row. Every program reads the
    # position; queue_push_advance_kernel moves it on afterwards. Norm and product in ACC, rounded to storage's type.
    b = tl.program_id(0).to(tl.int64) + first
    row = wrap(wrap(tl.load(position_ptr), K.to(tl.int64)) + b % K, K.to(tl.int64))
    key_ptr = keys_ptr + b * stride_kb
    factor = tl.full([1], 1.0, ACC)
    if NORMALIZE:
        squares = tl.zeros([BLOCK_D], ACC)
        for d0 in range(0, D, BLOCK_D):
            d = (d0 + tl.arange(0, BLOCK_D)).to(tl.int64)
            x = tl.load(key_ptr + d * stride_kd, mask=d < D, other=0.0).to(ACC)
            squares += x * x
        norm = tl.sqrt(tl.sum(squares, axis=0))
        eps = tl.full([], NORM_EPS, ACC)
        factor *= 1.0 / tl.where(norm < eps, eps, norm)
    for d0 in range(0, D, BLOCK_D):
        d = (d0 + tl.arange(0, BLOCK_D)).to(tl.int64)
        x = tl.load(key_ptr + d * stride_kd, mask=d < D, other=0.0).to(ACC)
        tl.store(storage_ptr + row * D + d, (x * factor).to(storage_ptr.dtype.element_ty), mask=d < D)


@triton.jit(do_not_specialize=["K", "B"])
def queue_push_advance_kernel(position_ptr, filled_ptr, K, B):
    # position = (position + B) mod K, filled = min(K, filled + B), after all keys are written.
    size = K.to(tl.int64)
    tl.store(position_ptr, wrap(wrap(tl.load(position_ptr), size) + B % size, size))
    filled = tl.load(filled_ptr)
    tl.store(filled_ptr, tl.minimum(size, tl.where(filled < 0, 0, filled) + B))


def unsupported(storage, *_, **__):
    """Why this backend cannot run a call, or None if it can."""
    return None if len(storage) < 2**31 else f"{len(storage)} rows are more than a grid has programs"


def queue_push_(storage, keys, position, filled, normalize):
    """`queue_push_` of docs/moco.md."""
    (size, width), count = storage.shape, keys.shape[0]
    if count == 0:
        return
    written = min(count, size)
    queue_push_kernel[written,](
        storage,
        keys,
        position,
        size,
        count,
        count - written,
        width,
        *keys.stride(),
        NORMALIZE=normalize,
        ACC=tl.float64 if keys.dtype == torch.float64 else tl.float32,
        BLOCK_D=min(1024, triton.next_power_of_2(width)),
        num_warps=1 if width <= 256 else 4,
    )
    queue_push_advance_kernel[1,](position, filled, size, count, num_warps=1)
