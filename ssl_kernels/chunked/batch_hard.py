"""`batch_hard` in plain PyTorch, a block of rows at a time. docs/batch_hard.md is the contract.

Keys of a block are (block, N) in float32 (float64 for float64 input); nothing larger is made.
"""

import torch

from ssl_kernels.chunked.rows import LOGITS_PER_BLOCK, unit_rows, without_autocast


@without_autocast
def batch_hard(embeddings, labels, normalize, distance):
    x, _ = unit_rows(embeddings, normalize)
    half = x.square().sum(1) / 2 if distance == "euclidean" else x.new_zeros(len(x))
    finite = torch.finfo(x.dtype)
    n = len(x)
    farthest, nearest = (torch.empty(n, dtype=torch.int64, device=x.device) for _ in range(2))
    size = max(1, LOGITS_PER_BLOCK // n)
    for start in range(0, n, size):
        block = slice(start, min(start + size, n))
        keys = (half - x[block] @ x.T).clamp_(finite.min, finite.max)  # (block, N)
        same = labels[block, None] == labels[None, :]
        nearest[block] = keys.masked_fill(same, torch.inf).argmin(1).where(~same.all(1), -1)
        same.diagonal(offset=start).fill_(False)
        farthest[block] = keys.masked_fill_(~same, -torch.inf).argmax(1).where(same.any(1), -1)
    return farthest, nearest
