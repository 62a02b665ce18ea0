"""A Triton kernel whose second product takes its left operand from registers, for the tests of the rig."""

import torch
import triton
import triton.language as tl


@triton.jit
def softmax_product_kernel(
    x_ptr, y_ptr, out_ptr, N, scale, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    x = tl.load(x_ptr + rows[:, None] * D + d[None, :])
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        columns = n0 + tl.arange(0, BLOCK_N)
        y = tl.load(y_ptr + columns[:, None] * D + d[None, :])
        p = tl.exp(tl.dot(x, tl.trans(y)) * scale)
        total += tl.sum(p, axis=1)
        acc = tl.dot(p.to(y.dtype), y, acc)
    tl.store(out_ptr + rows[:, None] * D + d[None, :], acc / total[:, None])


def softmax_product(x, y, scale):
    """softmax(scale * x y^T) y, shapes (M, D) and (N, D), M and N multiples of 64, D a power of two."""
    out = torch.empty(x.shape, device=x.device)
    grid = (x.shape[0] // 64,)
    softmax_product_kernel[grid](
        x, y, out, y.shape[0], scale, D=x.shape[1], BLOCK_M=64, BLOCK_N=64, num_warps=4
    )
    return out
