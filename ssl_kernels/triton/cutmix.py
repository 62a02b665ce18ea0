"""Triton kernels of `cutmix`; docs/mixing.md is the contract."""

import torch
import triton
import triton.language as tl

from ssl_kernels.triton.permutation_walk import (
    LAST_BIT,
    MOST_SAMPLES,
    has_flag,
    head_of,
    load_word,
    order,
    sample_of,
    successors,
)
from ssl_kernels.triton.samples import dense_result, has_dense_samples, sample_size, samples_like

# A thread owns one feature: masks that end anywhere forbid wider accesses, and neighbours stay together.
BLOCK, WARPS = 256, 8
SAMPLES = 16  # of a program out of place
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def inside_box(boxes_ptr, stride_box, stride_end, sample, row, column, H, W):
    """Which pixels lie inside the sample's box; one outside the image is clipped by the pixels there are."""
    box_ptr = boxes_ptr + sample.to(tl.int64) * stride_box
    y0 = tl.load(box_ptr)
    y1 = tl.load(box_ptr + stride_end)
    x0 = tl.load(box_ptr + 2 * stride_end)
    x1 = tl.load(box_ptr + 3 * stride_end)
    return (row >= y0) & (row < y1) & (column >= x0) & (column < x1)


@triton.jit(do_not_specialize=["B", "H", "W", "row_stride", "column_stride", "stride_box", "stride_end"])
def cutmix_walk_kernel(
    x_ptr,
    boxes_ptr,
    word_ptr,
    inverse_ptr,
    stride_x,
    stride_box,
    stride_end,
    row_stride,
    column_stride,
    F,
    B,
    H,
    W,
    BLOCK: tl.constexpr,
):
    # x_j inside box j becomes x_p(j), in place.
    # Feature f lies in row f // row_stride % H and column f // column_stride % W.
    # Tiling: a program owns BLOCK features and walks all samples along the cycles (permutation_walk.py): a sample is
    #   read for its predecessor before its own box is pasted over. What the first of a cycle loses to its own box and
    #   the last one (the first's predecessor, by the inverse) needs is held aside. Nothing is shared between programs.
    # Traffic: what lies under the boxes, read once and written once; a word and a box a sample for each warp from the
    #   first-level cache.
    features = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = features // row_stride % H
    column = features // column_stride % W
    here = features < F
    first = tl.zeros([BLOCK], x_ptr.dtype.element_ty)
    held = tl.zeros([BLOCK], tl.int1)
    word = load_word(word_ptr, 0, B)
    for k in range(B):
        next_word = load_word(word_ptr, k + 1, B)
        sample = sample_of(word)
        last = has_flag(word, LAST_BIT)
        starts = sample == head_of(word)
        inside = here & inside_box(boxes_ptr, stride_box, stride_end, sample, row, column, H, W)
        inside &= ~(starts & last)
        sample_ptr = x_ptr + sample * stride_x + features
        if starts:
            end = tl.load(inverse_ptr + sample)
            held = inside & inside_box(boxes_ptr, stride_box, stride_end, end, row, column, H, W)
            first = tl.load(sample_ptr, mask=held, other=0)
        source = tl.where(last, head_of(word), sample_of(next_word))
        values = tl.load(x_ptr + source * stride_x + features, mask=inside & (~(last & held)), other=0)
        tl.store(sample_ptr, tl.where(last & held, first, values), mask=inside)
        word = next_word


@triton.jit(do_not_specialize=["B", "H", "W", "row_stride", "column_stride", "stride_box", "stride_end"])
def cutmix_gather_kernel(
    x_ptr,
    out_ptr,
    boxes_ptr,
    source_ptr,
    stride_x,
    stride_out,
    stride_source,
    stride_box,
    stride_end,
    row_stride,
    column_stride,
    F,
    B,
    H,
    W,
    BACKWARD: tl.constexpr,
    ACC: tl.constexpr,
    SAMPLES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # out_i = x_i outside box i, x_p(i) inside; BACKWARD, with the inverse q: [outside box_j] g_j + [inside box_q(j)]
    # g_q(j), and g_j at a fixed point.
    # Tiling: a program owns BLOCK features and SAMPLES samples, one after the other.
    # Traffic: reads and writes B F elements; the boxes come from the first-level cache.
    # Numerics: values are moved as they are; the gradient's sum in ACC, rounded once.
    features = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = features // row_stride % H
    column = features // column_stride % W
    here = features < F
    first = tl.program_id(1) * SAMPLES
    for i in range(first, tl.minimum(first + SAMPLES, B)):
        i = i.to(tl.int64)
        source = tl.load(source_ptr + i * stride_source).to(tl.int64)
        source = tl.where((source >= 0) & (source < B), source, i)
        pasted = inside_box(boxes_ptr, stride_box, stride_end, i, row, column, H, W)
        taken = pasted
        if BACKWARD:
            taken = inside_box(boxes_ptr, stride_box, stride_end, source, row, column, H, W) & (source != i)
            pasted &= source != i
        own = tl.load(x_ptr + i * stride_x + features, mask=here & (~pasted), other=0)
        given = tl.load(x_ptr + source * stride_x + features, mask=here & taken, other=0)
        result = tl.where(taken, given, own)
        if BACKWARD:
            both = taken & (~pasted)
            result = tl.where(both, (own.to(ACC) + given.to(ACC)).to(own.dtype), result)
        tl.store(out_ptr + i * stride_out + features, result, mask=here)


def unsupported(x, *_):
    """Why these kernels cannot run a call, or None."""
    if x.element_size() not in BITS:
        return f"it takes elements of 1, 2, 4 or 8 bytes, not {x.dtype}"
    return None if len(x) < MOST_SAMPLES else f"it takes fewer than 2^30 samples, got {len(x)}"


def _image(boxes, dense):
    """Arguments that say where pixels and boxes lie."""
    strides = (max(dense.stride(-2), 1), max(dense.stride(-1), 1))
    return *boxes.stride(), *strides, sample_size(dense), len(dense), *dense.shape[-2:]


def _as_bits(x):
    return x.view(BITS[x.element_size()])


def cutmix_(x, boxes, permutation):
    dense = x if has_dense_samples(x) else x.contiguous()
    words = order(permutation).words
    programs = triton.cdiv(sample_size(dense), BLOCK)
    cutmix_walk_kernel[programs,](
        _as_bits(dense),
        boxes,
        words,
        successors(permutation, inverse=True),
        dense.stride(0),
        *_image(boxes, dense),
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    if dense is not x:
        x.copy_(dense)


def _gather(x, boxes, source, *, backward):
    out = torch.empty_like(x)
    dense = dense_result(out)
    x = samples_like(x, dense)
    grid = (triton.cdiv(sample_size(x), BLOCK), triton.cdiv(len(x), SAMPLES))
    cutmix_gather_kernel[grid](
        x if backward else _as_bits(x),
        dense if backward else _as_bits(dense),
        boxes,
        source,
        x.stride(0),
        dense.stride(0),
        source.stride(0),
        *_image(boxes, dense),
        BACKWARD=backward,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        SAMPLES=SAMPLES,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return out if dense is out else out.copy_(dense)


def cutmix_fwd(x, boxes, permutation):
    return _gather(x, boxes, permutation, backward=False)


def cutmix_bwd(grad, boxes, permutation):
    return _gather(grad, boxes, successors(permutation, inverse=True), backward=True)
