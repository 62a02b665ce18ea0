"""The order in which the mixing kernels walk a permutation, computed on the device by two small Triton kernels.

s(j) is the sample that j takes its partner from: p(j), or for gradients its inverse. The order lists every cycle as
j0, s(j0), s(s(j0)), ... from its smallest sample j0, the cycles by j0. A step is one 64-bit word, read by every
thread of a walk: sample, cycle's first sample, and three flags; its weights lie beside it.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

MOST_SAMPLES = 1 << 30
INDEX_BITS: tl.constexpr = tl.constexpr(30)
INDEX_MASK: tl.constexpr = tl.constexpr((1 << 30) - 1)
READ_BIT: tl.constexpr = tl.constexpr(60)  # the values of the sample are needed
WRITE_BIT: tl.constexpr = tl.constexpr(61)  # the result is written
LAST_BIT: tl.constexpr = tl.constexpr(62)  # last of its cycle

BLOCK = 1024
# Up to here the order is made by one block of samples.
MOST_IN_A_BLOCK = 4096


@triton.jit(do_not_specialize=["B", "stride"])
def successor_kernel(
    permutation_ptr, stride, successor_ptr, seen_ptr, B, INVERSE: tl.constexpr, BLOCK: tl.constexpr
):
    # s(j), by one program; the identity where the numbers are no permutation of 0 ... B - 1.
    for j0 in range(0, B, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        tl.store(seen_ptr + j, 0, mask=j < B)
    tl.debug_barrier()
    faults = 0
    for j0 in range(0, B, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        partner = tl.load(permutation_ptr + j.to(tl.int64) * stride, mask=j < B, other=0)
        inside = (partner >= 0) & (partner < B)
        seen = tl.atomic_xchg(seen_ptr + tl.where(inside, partner, 0), 1, mask=inside & (j < B))
        wrong = tl.where(inside, seen, 1)
        faults += tl.sum(tl.where(j < B, wrong, 0))
    for j0 in range(0, B, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        partner = tl.load(permutation_ptr + j.to(tl.int64) * stride, mask=j < B, other=0).to(tl.int32)
        partner = tl.where(faults == 0, partner, j)
        if INVERSE:
            tl.store(successor_ptr + partner, j, mask=j < B)
        else:
            tl.store(successor_ptr + j, partner, mask=j < B)


@triton.jit
def step_weights(lam_ptr, lam_stride, j, successor, inside, INVERSE: tl.constexpr):
    """own and next of samples: lam_j and 1 - lam_j, inverse 1 - lam_s(j); 1 and 0 at a fixed point."""
    own = tl.load(lam_ptr + j.to(tl.int64) * lam_stride, mask=inside, other=1.0)
    if INVERSE:
        next = 1.0 - tl.load(lam_ptr + successor.to(tl.int64) * lam_stride, mask=inside, other=1.0)
    else:
        next = 1.0 - own
    fixed = successor == j
    return tl.where(fixed, 1.0, own), tl.where(fixed, 0.0, next)


@triton.jit
def store_steps(
    word_ptr, own_ptr, next_ptr, needed_ptr, lam_ptr, lam_stride, j, successor, head, length, distance, begin, inside,
    INVERSE: tl.constexpr, IN_PLACE: tl.constexpr, EVERYTHING: tl.constexpr,
):  # fmt: skip
    """The words and weights of samples whose cycle has this head and length and begins at `begin` of the order."""
    rank = tl.where(j == head, 0, length - distance)
    position = begin + rank
    written = (successor != j).to(tl.int64)
    read = written
    if lam_ptr is not None:
        own, next = step_weights(lam_ptr, lam_stride, j, successor, inside, INVERSE)
        tl.store(own_ptr + position, own, mask=inside)
        tl.store(next_ptr + position, next, mask=inside)
        written = ((own != 1.0) | (next != 0.0)).to(tl.int64) if IN_PLACE else tl.full(j.shape, 1, tl.int64)
        needed = tl.load(needed_ptr + j, mask=inside, other=0)
        reads_own = (own != 0.0) & (written != 0)
        read = ((needed != 0) | reads_own | (EVERYTHING & (successor != j))).to(tl.int64)
    last = (rank == length - 1).to(tl.int64)
    word = j.to(tl.int64) | (head.to(tl.int64) << INDEX_BITS)
    word |= (read << READ_BIT) | (written << WRITE_BIT) | (last << LAST_BIT)
    tl.store(word_ptr + position, word, mask=inside)


@triton.jit(do_not_specialize=["B", "lam_stride"])
def order_block_kernel(
    successor_ptr,
    lam_ptr,
    lam_stride,
    needed_ptr,
    word_ptr,
    own_ptr,
    next_ptr,
    B,
    INVERSE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    EVERYTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # What order_kernel makes, where all samples are one block: jump, smallest and distance stay in registers, and a
    # round gathers them through shared memory. needed (B,) int32 is scratch.
    j = tl.arange(0, BLOCK)
    inside = j < B
    successor = tl.where(inside, tl.load(successor_ptr + j, mask=inside, other=0), j)
    if lam_ptr is not None:
        _, next = step_weights(lam_ptr, lam_stride, j, successor, inside, INVERSE)
        tl.store(needed_ptr + successor, (next != 0.0).to(tl.int32), mask=inside)
        tl.debug_barrier()
    jump = successor
    smallest = j
    distance = tl.zeros([BLOCK], tl.int32)
    reach = tl.full([], 1, tl.int32)
    while reach < B:
        there = tl.gather(smallest, jump, 0)
        distance = tl.where(there < smallest, reach + tl.gather(distance, jump, 0), distance)
        smallest = tl.minimum(smallest, there)
        jump = tl.gather(jump, jump, 0)
        reach *= 2
    length = tl.gather(distance, tl.gather(successor, smallest, 0), 0) + 1
    of_heads = tl.where((smallest == j) & inside, length, 0)
    begin = tl.gather(tl.cumsum(of_heads) - of_heads, smallest, 0)
    store_steps(
        word_ptr, own_ptr, next_ptr, needed_ptr, lam_ptr, lam_stride, j, successor, smallest, length, distance, begin,
        inside, INVERSE, IN_PLACE, EVERYTHING,
    )  # fmt: skip


@triton.jit(do_not_specialize=["B", "lam_stride"])
def order_kernel(
    successor_ptr,
    lam_ptr,
    lam_stride,
    scratch_ptr,
    word_ptr,
    own_ptr,
    next_ptr,
    B,
    INVERSE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    EVERYTHING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # The words and weights of the walk, by one program. Pointer doubling: after r rounds jump is s^(2^r), smallest and
    # distance tell the smallest sample among the 2^r from here on and how far off it is, so log2(B) rounds do
    # whatever the cycles are. IN_PLACE: what would stay as it is is not written. EVERYTHING: all samples but fixed
    # points are read. Without lam only words are made, and everything but fixed points is written.
    # scratch (8, B): jump, smallest, distance, twice; begin; whether the predecessor needs the sample.
    size = B.to(tl.int64)
    begin_ptr = scratch_ptr + 6 * size
    needed_ptr = scratch_ptr + 7 * size
    for j0 in range(0, B, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        successor = tl.load(successor_ptr + j, mask=j < B, other=0)
        tl.store(scratch_ptr + j, successor, mask=j < B)
        tl.store(scratch_ptr + size + j, j, mask=j < B)
        tl.store(scratch_ptr + 2 * size + j, 0, mask=j < B)
        if lam_ptr is not None:
            _, next = step_weights(lam_ptr, lam_stride, j, successor, j < B, INVERSE)
            tl.store(needed_ptr + successor, (next != 0.0).to(tl.int32), mask=j < B)
    tl.debug_barrier()
    now = tl.zeros([], tl.int64)
    reach = tl.full([], 1, tl.int32)
    while reach < B:
        jump_ptr = scratch_ptr + now
        new_ptr = scratch_ptr + (3 * size - now)
        for j0 in range(0, B, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            far = tl.load(jump_ptr + j, mask=j < B, other=0)
            here = tl.load(jump_ptr + size + j, mask=j < B, other=0)
            there = tl.load(jump_ptr + size + far, mask=j < B, other=0)
            steps = tl.load(jump_ptr + 2 * size + j, mask=j < B, other=0)
            steps_from_far = tl.load(jump_ptr + 2 * size + far, mask=j < B, other=0)
            tl.store(new_ptr + j, tl.load(jump_ptr + far, mask=j < B, other=0), mask=j < B)
            tl.store(new_ptr + size + j, tl.minimum(here, there), mask=j < B)
            tl.store(
                new_ptr + 2 * size + j, tl.where(there < here, reach + steps_from_far, steps), mask=j < B
            )
        now = 3 * size - now
        reach *= 2
        tl.debug_barrier()
    smallest_ptr = scratch_ptr + now + size
    distance_ptr = smallest_ptr + size
    total = 0
    for j0 in range(0, B, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        successor = tl.load(successor_ptr + j, mask=j < B, other=0)
        starts = (tl.load(smallest_ptr + j, mask=j < B, other=-1) == j) & (j < B)
        length = tl.where(starts, tl.load(distance_ptr + successor, mask=starts, other=0) + 1, 0)
        tl.store(begin_ptr + j, total + tl.cumsum(length) - length, mask=starts)
        total += tl.sum(length)
    tl.debug_barrier()
    for j0 in range(0, B, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        successor = tl.load(successor_ptr + j, mask=j < B, other=0)
        head = tl.load(smallest_ptr + j, mask=j < B, other=0)
        after_head = tl.load(successor_ptr + head, mask=j < B, other=0)
        length = tl.load(distance_ptr + after_head, mask=j < B, other=0) + 1
        distance = tl.load(distance_ptr + j, mask=j < B, other=0)
        begin = tl.load(begin_ptr + head, mask=j < B, other=0)
        store_steps(
            word_ptr, own_ptr, next_ptr, needed_ptr, lam_ptr, lam_stride, j, successor, head, length, distance, begin,
            j < B, INVERSE, IN_PLACE, EVERYTHING,
        )  # fmt: skip


@triton.jit
def load_word(word_ptr, k, B):
    """The k-th step; past the end one that neither reads nor writes."""
    return tl.load(word_ptr + k, mask=k < B, other=0)


@triton.jit
def sample_of(word):
    return word & INDEX_MASK


@triton.jit
def head_of(word):
    return (word >> INDEX_BITS) & INDEX_MASK


@triton.jit
def has_flag(word, BIT: tl.constexpr):
    return ((word >> BIT) & 1) != 0


@triton.jit
def load_sample(ptr, word, stride, features, F):
    """Features of the step's sample, 0 where nobody needs them; stride and F are multiples of a vector."""
    inside = (features < F) & has_flag(word, READ_BIT)
    return tl.load(ptr + sample_of(word) * stride + features, mask=inside, other=0)


class Steps(NamedTuple):
    """What the walks read; own and next None where only the order was wanted."""

    words: torch.Tensor  # (B,) int64
    own: torch.Tensor | None  # (B,)
    next: torch.Tensor | None  # (B,)


def successors(permutation, *, inverse=False):
    """(B,) int32 on the device of the permutation."""
    count = len(permutation)
    successor, seen = torch.empty(2, count, dtype=torch.int32, device=permutation.device)
    successor_kernel[1,](
        permutation, permutation.stride(0), successor, seen, count, INVERSE=inverse, BLOCK=BLOCK
    )
    return successor


def order(permutation, lam=None, *, inverse=False, in_place=False, everything=False):
    """The steps of a walk; nothing is read on the host."""
    count = len(permutation)
    successor = successors(permutation, inverse=inverse)
    words = permutation.new_empty(count)
    own = next = None
    if lam is not None:
        own, next = lam.new_empty(2, count)
    small = count <= MOST_IN_A_BLOCK
    block = max(32, triton.next_power_of_2(count)) if small else BLOCK
    kernel = order_block_kernel if small else order_kernel
    kernel[1,](
        successor,
        lam,
        0 if lam is None else lam.stride(0),
        successor.new_empty(1 if small else 8, count),
        words,
        own,
        next,
        count,
        INVERSE=inverse,
        IN_PLACE=in_place,
        EVERYTHING=everything,
        BLOCK=block,
        num_warps=min(16, block // 32) if small else 4,
    )
    return Steps(words, own, next)
