"""`momentum_update_` by its definition."""

import torch


def momentum_update_(masters, shadows, sources, weight):
    """Move float32 `masters` towards `sources` and round them into `shadows`; docs/moco.md is the contract.

    Args:
        masters: float32, overwritten. Where a shadow is not its master rounded, the shadow is the average.
        shadows: float16 or bfloat16 of the same shapes, overwritten.
        sources: float32, float16 or bfloat16 of the same shapes.
        weight: 0-d float32, 1 − m of ξ ← m ξ + (1 − m) θ.
    """
    for master, shadow, source in zip(masters, shadows, sources, strict=True):
        average = torch.where(master.to(shadow.dtype) == shadow, master, shadow.float())
        master.copy_((1 - weight) * average + weight * source.float())
        shadow.copy_(master)
