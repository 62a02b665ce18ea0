"""Triton kernel of `mixup_normalize`; docs/mixing.md is the contract."""

import torch
import triton
import triton.language as tl

from ssl_kernels.triton.permutation_walk import (
    LAST_BIT,
    MOST_SAMPLES,
    has_flag,
    load_sample,
    load_word,
    order,
    sample_of,
)
from ssl_kernels.triton.samples import dense_result, sample_size, samples_like, vector_of

# Features that a program owns: 16 bytes of the images per thread.
BLOCK, WARPS = 2048, 4


@triton.jit(
    do_not_specialize=[
        *("stride_x", "stride_out", "stride_mean", "stride_std", "channel_stride"),
        *("F_x", "F_out", "B", "C"),
    ]
)
def mixup_normalize_kernel(
    x_ptr,
    out_ptr,
    mean_ptr,
    std_ptr,
    word_ptr,
    own_ptr,
    next_ptr,
    stride_x,
    stride_out,
    stride_mean,
    stride_std,
    channel_stride,
    F_x,
    F_out,
    B,
    C,
    VECTOR_X: tl.constexpr,
    VECTOR_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # out_i = scale_c (lam_i x_i + (1 - lam_i) x_p(i)) + shift_c, scale_c = 1 / (255 std_c), shift_c = -mean_c / std_c;
    # feature f lies in channel f // channel_stride % C.
    # Tiling: a program owns BLOCK features and walks all samples along the cycles (permutation_walk.py), three samples
    #   ahead of what it writes, the first of a cycle held aside. A thread reads 16 bytes of the images; the results go
    #   through shared memory, so that a warp writes consecutive ones.
    # Traffic: reads B F bytes, writes B F elements; three numbers per sample for each warp from the first-level cache.
    # Numerics: scale and shift from float64; shares, products and sums in float32, rounded once.
    # stride_x and F_x come in vectors of the images, stride_out and F_out in those of the result: F is either.
    stride_x = stride_x.to(tl.int64) * VECTOR_X
    stride_out = stride_out.to(tl.int64) * VECTOR_OUT
    F_x = F_x.to(tl.int64) * VECTOR_X
    F_out = F_out.to(tl.int64) * VECTOR_OUT
    features = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = features // channel_stride % C
    std = tl.load(std_ptr + channel * stride_std).to(tl.float64)
    scale = (1.0 / (255.0 * std)).to(tl.float32)
    shift = (-tl.load(mean_ptr + channel * stride_mean).to(tl.float64) / std).to(tl.float32)
    word0 = load_word(word_ptr, 0, B)
    word1 = load_word(word_ptr, 1, B)
    word2 = load_word(word_ptr, 2, B)
    x0 = load_sample(x_ptr, word0, stride_x, features, F_x)
    x1 = load_sample(x_ptr, word1, stride_x, features, F_x)
    x2 = load_sample(x_ptr, word2, stride_x, features, F_x)
    first = x0
    for k in range(B):
        word3 = load_word(word_ptr, k + 3, B)
        x3 = load_sample(x_ptr, word3, stride_x, features, F_x)
        last = has_flag(word0, LAST_BIT)
        partner = tl.where(last, first, x1)
        mixed = tl.load(own_ptr + k) * x0.to(tl.float32) + tl.load(next_ptr + k) * partner.to(tl.float32)
        result = (scale * mixed + shift).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + sample_of(word0) * stride_out + features, result, mask=features < F_out)
        first = tl.where(last, x1, first)
        word0, word1, word2 = word1, word2, word3
        x0, x1, x2 = x1, x2, x3


def unsupported(x, *_):
    """Why this kernel cannot run a call, or None."""
    return None if len(x) < MOST_SAMPLES else f"it takes fewer than 2^30 samples, got {len(x)}"


def mixup_normalize(x, lam, permutation, mean, std, dtype):
    out = torch.empty_like(x, dtype=dtype)
    dense = dense_result(out)
    x = samples_like(x, dense)
    size, vector_x, vector_out = sample_size(x), vector_of(x), vector_of(dense)
    mixup_normalize_kernel[triton.cdiv(size, BLOCK),](
        x,
        dense,
        mean,
        std,
        *order(permutation, lam),
        x.stride(0) // vector_x,
        dense.stride(0) // vector_out,
        mean.stride(0),
        std.stride(0),
        max(dense.stride(1), 1),
        size // vector_x,
        size // vector_out,
        len(x),
        x.shape[1],
        VECTOR_X=vector_x,
        VECTOR_OUT=vector_out,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return out if dense is out else out.copy_(dense)
