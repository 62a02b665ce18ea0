"""Mixup of 8-bit images followed by normalisation, by its definition."""

import torch

from ssl_kernels.reference.mixup import mixup


def mixup_normalize(x, lam, permutation, mean, std, dtype):
    """((λ_i x_i + (1 − λ_i) x_p(i)) / 255 − mean) / std; docs/mixing.md is the contract.

    Args:
        x: (B, C, H, W) uint8.
        lam: (B,) in [0, 1]; its dtype is what is computed in.
        permutation: (B,) int64.
        mean, std: (C,), of images in [0, 1].
        dtype: Of the result.

    Returns:
        (B, C, H, W) in the layout of x.
    """
    per_channel = (1, -1, 1, 1)
    mixed = mixup(x.to(lam.dtype), lam, permutation)
    mean, std = mean.to(lam.dtype).view(per_channel), std.to(lam.dtype).view(per_channel)
    normalized = (mixed / 255 - mean) / std
    return torch.empty_like(x, dtype=dtype).copy_(normalized)
