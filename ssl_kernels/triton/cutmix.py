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
from ssl_kernels.triton.samples import dense_result, has_dense_samples, sample_size, samples_like, vector_of

# Bytes of a sample that a program owns, 16 a thread.
BYTES, WARPS = 2048, 4
SAMPLES = 16  # of a program out of place
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def box_of(boxes_ptr, stride_box, stride_end, sample, H, W):
    """y0, y1, x0, x1 of a sample, clipped to the image."""
    box_ptr = boxes_ptr + sample.to(tl.int64) * stride_box
    stride_end = stride_end.to(tl.int64)
    y0 = tl.minimum(tl.maximum(tl.load(box_ptr), 0), H).to(tl.int32)
    y1 = tl.minimum(tl.maximum(tl.load(box_ptr + stride_end), 0), H).to(tl.int32)
    x0 = tl.minimum(tl.maximum(tl.load(box_ptr + 2 * stride_end), 0), W).to(tl.int32)
    x1 = tl.minimum(tl.maximum(tl.load(box_ptr + 3 * stride_end), 0), W).to(tl.int32)
    return y0, y1, x0, x1


@triton.jit
def pixels_of(features, row_stride, column_stride, H, W):
    """Row and column of features (vectors, VECTOR); then of each vector the first and last row and column."""
    row = (features // row_stride % H).to(tl.int32)
    column = (features // column_stride % W).to(tl.int32)
    return row, column, tl.min(row, 1), tl.max(row, 1), tl.min(column, 1), tl.max(column, 1)


@triton.jit
def inside(pixels, box):
    """Which pixels lie inside a box."""
    row, column, _, _, _, _ = pixels
    y0, y1, x0, x1 = box
    return (row >= y0) & (row < y1) & (column >= x0) & (column < x1)


@triton.jit
def touched(pixels, box):
    """Which vectors may have pixels inside a box; all that have, and only those where a vector lies in one row."""
    _, _, first_row, last_row, first_column, last_column = pixels
    y0, y1, x0, x1 = box
    return (last_row >= y0) & (first_row < y1) & (last_column >= x0) & (first_column < x1)


@triton.jit
def covered(pixels, box):
    """Which vectors have all their pixels inside a box."""
    _, _, first_row, last_row, first_column, last_column = pixels
    y0, y1, x0, x1 = box
    return (first_row >= y0) & (last_row < y1) & (first_column >= x0) & (last_column < x1)


NOT_SPECIALIZED = (
    *("stride_x", "stride_out", "stride_source", "stride_box", "stride_end", "row_stride", "column_stride"),
    *("F", "B", "H", "W"),
)


@triton.jit(
    do_not_specialize=[name for name in NOT_SPECIALIZED if name not in ("stride_out", "stride_source")]
)
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
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # x_j inside box j becomes x_p(j), in place.
    # Feature f lies in row f // row_stride % H and column f // column_stride % W.
    # Tiling: a program owns BLOCK features, a thread VECTOR of them at a time, and walks all samples along the cycles
    #   (permutation_walk.py): a sample is read for its predecessor before its own box is pasted over. What the first of
    #   a cycle loses to its own box and the last one (the first's predecessor, by the inverse) needs is held aside.
    #   Vectors are read whole where a box touches them and written whole where it covers them, else pixel by pixel.
    #   Nothing is shared between programs.
    # Traffic: the sectors under the boxes, read once and written once; a word and a box a sample for each warp from the
    #   first-level cache.
    # stride_x and F come in vectors.
    stride_x = stride_x.to(tl.int64) * VECTOR
    vectors = tl.program_id(0).to(tl.int64) * (BLOCK // VECTOR) + tl.arange(0, BLOCK // VECTOR)
    features = vectors[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    pixels = pixels_of(features, row_stride, column_stride, H, W)
    here = vectors < F
    first = tl.zeros([BLOCK // VECTOR, VECTOR], x_ptr.dtype.element_ty)
    held = tl.zeros([BLOCK // VECTOR], tl.int1)
    word = load_word(word_ptr, 0, B)
    for k in range(B):
        next_word = load_word(word_ptr, k + 1, B)
        sample = sample_of(word)
        last = has_flag(word, LAST_BIT)
        starts = sample == head_of(word)
        box = box_of(boxes_ptr, stride_box, stride_end, sample, H, W)
        pasted = here & touched(pixels, box) & (~(starts & last))
        sample_ptr = x_ptr + sample * stride_x + features
        if starts:
            end = tl.load(inverse_ptr + sample)
            held = pasted & touched(pixels, box_of(boxes_ptr, stride_box, stride_end, end, H, W))
            first = tl.load(sample_ptr, mask=held[:, None], other=0)
        source = tl.where(last, head_of(word), sample_of(next_word))
        kept = last & held
        values = tl.load(x_ptr + source * stride_x + features, mask=(pasted & (~kept))[:, None], other=0)
        values = tl.where(kept[:, None], first, values)
        whole = pasted & covered(pixels, box)
        tl.store(sample_ptr, values, mask=whole[:, None])
        tl.store(sample_ptr, values, mask=(pasted & (~whole))[:, None] & inside(pixels, box))
        word = next_word


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
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
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # out_i = x_i outside box i, x_p(i) inside; BACKWARD, with the inverse q: [outside box_j] g_j + [inside box_q(j)]
    # g_q(j), and g_j at a fixed point.
    # Tiling: a program owns BLOCK features, a thread VECTOR of them at a time, and SAMPLES samples one after the other.
    #   Programs of the same samples follow one another: a grid's second dimension has room for 65535 only.
    # Traffic: reads and writes B F elements, and reads twice the vectors that an edge of a box divides; the boxes come
    #   from the first-level cache.
    # Numerics: values are moved as they are; the gradient's sum in ACC, rounded once.
    # stride_x, stride_out and F come in vectors.
    stride_x = stride_x.to(tl.int64) * VECTOR
    stride_out = stride_out.to(tl.int64) * VECTOR
    programs = tl.cdiv(F, BLOCK // VECTOR)
    vectors = (tl.program_id(0) % programs).to(tl.int64) * (BLOCK // VECTOR) + tl.arange(0, BLOCK // VECTOR)
    features = vectors[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    pixels = pixels_of(features, row_stride, column_stride, H, W)
    here = vectors < F
    begin = tl.program_id(0) // programs * SAMPLES
    for i in range(begin, tl.minimum(begin + SAMPLES, B)):
        i = i.to(tl.int64)
        source = tl.load(source_ptr + i * stride_source).to(tl.int64)
        source = tl.where((source >= 0) & (source < B), source, i)
        box = box_of(boxes_ptr, stride_box, stride_end, i, H, W)
        pasted = inside(pixels, box)
        loses = covered(pixels, box)  # all of the own values
        taken, takes = pasted, touched(pixels, box)
        if BACKWARD:
            other = source != i
            source_box = box_of(boxes_ptr, stride_box, stride_end, source, H, W)
            taken, takes = inside(pixels, source_box) & other, touched(pixels, source_box) & other
            pasted &= other
            loses &= other
        own = tl.load(x_ptr + i * stride_x + features, mask=(here & (~loses))[:, None], other=0)
        given = tl.load(x_ptr + source * stride_x + features, mask=(here & takes)[:, None], other=0)
        if BACKWARD:
            both = (own.to(ACC) + given.to(ACC)).to(own.dtype)
            result = tl.where(taken, tl.where(pasted, given, both), tl.where(pasted, tl.zeros_like(own), own))
        else:
            result = tl.where(taken, given, own)
        tl.store(out_ptr + i * stride_out + features, result, mask=here[:, None])


def unsupported(x, *_):
    """Why these kernels cannot run a call, or None."""
    if x.element_size() not in BITS:
        return f"it takes elements of 1, 2, 4 or 8 bytes, not {x.dtype}"
    return None if len(x) < MOST_SAMPLES else f"it takes fewer than 2^30 samples, got {len(x)}"


def _image(boxes, dense, vector):
    """Arguments that say where pixels and boxes lie."""
    strides = (max(dense.stride(-2), 1), max(dense.stride(-1), 1))
    return *boxes.stride(), *strides, sample_size(dense) // vector, len(dense), *dense.shape[-2:]


def _as_bits(x):
    return x.view(BITS[x.element_size()])


def cutmix_(x, boxes, permutation):
    dense = x if has_dense_samples(x) else x.contiguous()
    words = order(permutation).words
    vector, block = vector_of(dense), BYTES // dense.element_size()
    programs = triton.cdiv(sample_size(dense), block)
    cutmix_walk_kernel[programs,](
        _as_bits(dense),
        boxes,
        words,
        successors(permutation, inverse=True),
        dense.stride(0) // vector,
        *_image(boxes, dense, vector),
        VECTOR=vector,
        BLOCK=block,
        num_warps=WARPS,
    )
    if dense is not x:
        x.copy_(dense)


def _gather(x, boxes, source, *, backward):
    out = torch.empty_like(x)
    dense = dense_result(out)
    x = samples_like(x, dense)
    vector, block = vector_of(x, dense), BYTES // x.element_size()
    programs = triton.cdiv(sample_size(x), block) * triton.cdiv(len(x), SAMPLES)
    cutmix_gather_kernel[programs,](
        x if backward else _as_bits(x),
        dense if backward else _as_bits(dense),
        boxes,
        source,
        x.stride(0) // vector,
        dense.stride(0) // vector,
        source.stride(0),
        *_image(boxes, dense, vector),
        BACKWARD=backward,
        ACC=tl.float64 if x.dtype == torch.float64 else tl.float32,
        SAMPLES=SAMPLES,
        VECTOR=vector,
        BLOCK=block,
        num_warps=WARPS,
    )
    return out if dense is out else out.copy_(dense)


def cutmix_fwd(x, boxes, permutation):
    return _gather(x, boxes, permutation, backward=False)


def cutmix_bwd(grad, boxes, permutation):
    return _gather(grad, boxes, successors(permutation, inverse=True), backward=True)
