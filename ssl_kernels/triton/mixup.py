"""Triton kernels of `mixup`; docs/mixing.md is the contract."""

import torch
import triton
import triton.language as tl

from ssl_kernels.triton.permutation_walk import (
    LAST_BIT,
    MOST_SAMPLES,
    WRITE_BIT,
    has_flag,
    head_of,
    load_sample,
    load_word,
    order,
    sample_of,
)
from ssl_kernels.triton.samples import dense_result, has_dense_samples, sample_size, samples_like, vector_of

# Bytes of a sample that a program owns, 32 a thread.
WALK_BYTES, WALK_WARPS = 4096, 4
GRAD_BYTES, GRAD_WARPS = 1024, 1


@triton.jit
def mix(own, x, next, partner):
    """own · x + next · partner, rounded once; what has no weight is left out, what has all of it is copied."""
    mixed = own * x.to(own.dtype) + next * partner.to(own.dtype)
    mixed = tl.where(next == 0.0, own * x.to(own.dtype), mixed)
    mixed = tl.where(own == 0.0, next * partner.to(own.dtype), mixed).to(x.dtype)
    mixed = tl.where((own == 1.0) & (next == 0.0), x, mixed)
    return tl.where((own == 0.0) & (next == 1.0), partner, mixed)


@triton.jit(do_not_specialize=["stride_x", "stride_out", "F", "B"])
def mixup_walk_kernel(
    x_ptr,
    out_ptr,
    word_ptr,
    own_ptr,
    next_ptr,
    stride_x,
    stride_out,
    F,
    B,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # out_j = own_j x_j + next_j x_s(j), s the permutation or its inverse; out may be x.
    # Tiling: a program owns BLOCK features and walks all samples along the cycles (permutation_walk.py), three samples
    #   ahead of what it writes, the first of a cycle held aside. Nothing is shared between programs.
    # Traffic: each element is read once and written once; in place, samples that stay as they are are not written.
    #   Three numbers per sample for each warp from the first-level cache: 5 % of its data.
    # Numerics: shares, products and sum in the type of own, rounded once.
    # Strides and F come in vectors.
    stride_x = stride_x.to(tl.int64) * VECTOR
    stride_out = stride_out.to(tl.int64) * VECTOR
    F = F.to(tl.int64) * VECTOR
    features = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word0 = load_word(word_ptr, 0, B)
    word1 = load_word(word_ptr, 1, B)
    word2 = load_word(word_ptr, 2, B)
    x0 = load_sample(x_ptr, word0, stride_x, features, F)
    x1 = load_sample(x_ptr, word1, stride_x, features, F)
    x2 = load_sample(x_ptr, word2, stride_x, features, F)
    first = x0
    for k in range(B):
        word3 = load_word(word_ptr, k + 3, B)
        x3 = load_sample(x_ptr, word3, stride_x, features, F)
        last = has_flag(word0, LAST_BIT)
        mixed = mix(tl.load(own_ptr + k), x0, tl.load(next_ptr + k), tl.where(last, first, x1))
        inside = (features < F) & has_flag(word0, WRITE_BIT)
        tl.store(out_ptr + sample_of(word0) * stride_out + features, mixed, mask=inside)
        first = tl.where(last, x1, first)
        word0, word1, word2 = word1, word2, word3
        x0, x1, x2 = x1, x2, x3


@triton.jit(do_not_specialize=["stride_grad", "stride_x", "stride_grad_x", "F", "B"])
def mixup_grad_kernel(
    grad_ptr,
    x_ptr,
    grad_x_ptr,
    partial_ptr,
    word_ptr,
    own_ptr,
    next_ptr,
    stride_grad,
    stride_x,
    stride_grad_x,
    F,
    B,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Along the inverse s of the permutation, g the gradient of the result:
    #   grad_x_j = own_j g_j + next_j g_s(j)       partial_s(j) = sum_f g_s(j)f (x_s(j)f - x_jf), as p(s(j)) = j
    # Tiling: as above, one sample ahead; a program of one warp adds up its features of each sample into row
    #   program_id of partial (programs, B), which torch adds up.
    # Traffic: reads 2 B F elements, writes B F and one number per sample for each program. grad_x may be absent.
    # Strides and F come in vectors.
    stride_grad = stride_grad.to(tl.int64) * VECTOR
    stride_x = stride_x.to(tl.int64) * VECTOR
    stride_grad_x = stride_grad_x.to(tl.int64) * VECTOR
    F = F.to(tl.int64) * VECTOR
    features = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    sums_ptr = partial_ptr + tl.program_id(0).to(tl.int64) * B
    ACC: tl.constexpr = own_ptr.dtype.element_ty
    word0 = load_word(word_ptr, 0, B)
    word1 = load_word(word_ptr, 1, B)
    g0 = load_sample(grad_ptr, word0, stride_grad, features, F)
    x0 = load_sample(x_ptr, word0, stride_x, features, F)
    g1 = load_sample(grad_ptr, word1, stride_grad, features, F)
    x1 = load_sample(x_ptr, word1, stride_x, features, F)
    first_g, first_x = g0, x0
    for k in range(B):
        word2 = load_word(word_ptr, k + 2, B)
        g2 = load_sample(grad_ptr, word2, stride_grad, features, F)
        x2 = load_sample(x_ptr, word2, stride_x, features, F)
        last = has_flag(word0, LAST_BIT)
        partner_g = tl.where(last, first_g, g1)
        partner_x = tl.where(last, first_x, x1)
        successor = tl.where(last, head_of(word0), sample_of(word1))
        if grad_x_ptr is not None:
            mixed = mix(tl.load(own_ptr + k), g0, tl.load(next_ptr + k), partner_g)
            tl.store(grad_x_ptr + sample_of(word0) * stride_grad_x + features, mixed, mask=features < F)
        products = partner_g.to(ACC) * (partner_x.to(ACC) - x0.to(ACC))
        # A fixed point's difference is 0 whatever it holds.
        products = tl.where((features < F) & (successor != sample_of(word0)), products, 0.0)
        tl.store(sums_ptr + successor, tl.sum(products))
        first_g = tl.where(last, g1, first_g)
        first_x = tl.where(last, x1, first_x)
        word0, word1 = word1, word2
        g0, g1 = g1, g2
        x0, x1 = x1, x2


def unsupported(x, *_):
    """Why these kernels cannot run a call, or None."""
    if x.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float64, float32, float16 and bfloat16, not {x.dtype}"
    return None if len(x) < MOST_SAMPLES else f"it takes fewer than 2^30 samples, got {len(x)}"


def _walk(x, out, steps):
    size = sample_size(x)
    block, vector = WALK_BYTES // x.element_size(), vector_of(x, out)
    mixup_walk_kernel[triton.cdiv(size, block),](
        x,
        out,
        *steps,
        x.stride(0) // vector,
        out.stride(0) // vector,
        size // vector,
        len(x),
        VECTOR=vector,
        BLOCK=block,
        num_warps=WALK_WARPS,
    )


def mixup_(x, lam, permutation):
    dense = x if has_dense_samples(x) else x.contiguous()
    _walk(dense, dense, order(permutation, lam, in_place=True))
    if dense is not x:
        x.copy_(dense)


def mixup_fwd(x, lam, permutation):
    out = torch.empty_like(x)
    dense = dense_result(out)
    _walk(samples_like(x, dense), dense, order(permutation, lam))
    return out if dense is out else out.copy_(dense)


def mixup_bwd(grad, x, lam, permutation, x_needs_grad):
    grad_x = torch.empty_like(grad) if x_needs_grad else grad.new_empty(0)
    if x_needs_grad:
        dense = dense_result(grad_x)
    else:
        dense = grad if has_dense_samples(grad) else grad.contiguous()
    grad, grad_lam = samples_like(grad, dense), lam.new_empty(0)
    steps = order(permutation, lam, inverse=True, everything=x is not None)
    if x is not None:
        size, block = sample_size(grad), GRAD_BYTES // grad.element_size()
        x = samples_like(x, dense)
        programs = triton.cdiv(size, block)
        partial = lam.new_empty(programs, len(grad))
        vector = vector_of(grad, x, dense)
        mixup_grad_kernel[programs,](
            grad,
            x,
            dense if x_needs_grad else None,
            partial,
            *steps,
            grad.stride(0) // vector,
            x.stride(0) // vector,
            dense.stride(0) // vector,
            size // vector,
            len(grad),
            VECTOR=vector,
            BLOCK=block,
            num_warps=GRAD_WARPS,
        )
        grad_lam = partial.sum(0)
    elif x_needs_grad:
        _walk(grad, dense, steps)
    if x_needs_grad and dense is not grad_x:
        grad_x.copy_(dense)
    return grad_x, grad_lam
