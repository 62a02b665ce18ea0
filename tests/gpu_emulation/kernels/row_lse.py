"""A Triton kernel for the tests of the rig: row log-sum-exps of scale * X Y^T, their sum and a histogram."""

import torch
import triton
import triton.language as tl


@triton.jit
def row_lse_kernel(
    x_ptr, y_ptr, lse_ptr, total_ptr, counts_ptr, M, N, D, stride_xm, stride_yn, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < M
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        columns = n0 + tl.arange(0, BLOCK_N)
        column_mask = columns < N
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            x_mask = row_mask[:, None] & (d[None, :] < D)
            y_mask = column_mask[None, :] & (d[:, None] < D)
            x = tl.load(x_ptr + rows[:, None] * stride_xm + d[None, :], mask=x_mask, other=0.0)
            y = tl.load(y_ptr + columns[None, :] * stride_yn + d[:, None], mask=y_mask, other=0.0)
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
        s = tl.where(column_mask[None, :], acc * scale, float("-inf"))
        new_max = tl.maximum(running_max, tl.max(s, axis=1))
        p = tl.exp(s - new_max[:, None])
        running_sum = running_sum * tl.exp(running_max - new_max) + tl.sum(p, axis=1)
        running_max = new_max
    lse = running_max + tl.log(running_sum)
    tl.store(lse_ptr + rows, lse, mask=row_mask)
    tl.atomic_add(total_ptr, tl.sum(tl.where(row_mask, lse, 0.0), axis=0))
    tl.atomic_add(counts_ptr + tl.arange(0, BLOCK_M) % 4, tl.where(row_mask, 1, 0))


def row_lse(x, y, scale=10.0, precision="ieee"):
    """lse (M,), their sum (1,), and how many rows i of each block have i % 4 = 0, 1, 2, 3."""
    lse = torch.full((x.shape[0],), torch.nan, device=x.device)
    total = torch.zeros(1, device=x.device)
    counts = torch.zeros(4, dtype=torch.int32, device=x.device)
    grid = (triton.cdiv(x.shape[0], 64),)
    row_lse_kernel[grid](
        x, y, lse, total, counts, x.shape[0], y.shape[0], x.shape[1], x.stride(0), y.stride(0), scale,
        BLOCK_M=64, BLOCK_N=64, BLOCK_D=32, PRECISION=precision, num_warps=4,
    )  # fmt: skip
    return lse, total, counts
