"""Triton kernel of `momentum_update_`; docs/moco.md is the contract."""

import triton
import triton.language as tl

BLOCK = 4096


@triton.jit
def momentum_update_kernel(master_ptr, shadow_ptr, source_ptr, count, weight_ptr, BLOCK: tl.constexpr):
    # average = master where shadow is its rounding, else shadow; master = average + weight (source - average), from the
    # nearer end; shadow = master rounded. A program owns BLOCK neighbouring elements of one tensor.
    # Traffic: reads master, shadow and source once, writes master and shadow.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < count
    master = tl.load(master_ptr + i, mask=inside)
    written = tl.load(shadow_ptr + i, mask=inside).to(tl.float32)
    source = tl.load(source_ptr + i, mask=inside).to(tl.float32)
    rounded = master.to(shadow_ptr.dtype.element_ty).to(tl.float32)
    average = tl.where(rounded == written, master, written)
    weight = tl.load(weight_ptr)
    near = weight < 0.5
    moved = tl.where(near, average, source) + tl.where(near, weight, weight - 1.0) * (source - average)
    tl.store(master_ptr + i, moved, mask=inside)
    tl.store(shadow_ptr + i, moved.to(shadow_ptr.dtype.element_ty), mask=inside)


def unsupported(*_, **__):
    """Why this backend cannot run a call, or None if it can."""
    return None


def momentum_update_(masters, shadows, sources, weight):
    """`momentum_update_` of docs/moco.md: one launch a tensor."""
    for master, shadow, source in zip(masters, shadows, sources, strict=True):
        if master.numel():
            momentum_update_kernel[triton.cdiv(master.numel(), BLOCK),](
                master, shadow, source, master.numel(), weight, BLOCK=BLOCK, num_warps=8
            )
