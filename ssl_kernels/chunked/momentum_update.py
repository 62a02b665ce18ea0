"""`momentum_update_` in plain PyTorch, a few calls over all tensors. docs/moco.md is the contract."""

import torch


def momentum_update_(masters, shadows, sources, weight):
    if not masters:
        return
    for master, shadow in zip(masters, shadows, strict=True):
        master.copy_(torch.where(master.to(shadow.dtype) == shadow, master, shadow.float()))
    torch._foreach_lerp_(masters, [source.float() for source in sources], [weight] * len(masters))
    torch._foreach_copy_(shadows, masters)
