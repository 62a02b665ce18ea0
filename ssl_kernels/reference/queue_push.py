"""`queue_push_` by its definition: one key after the other into the ring."""

import torch
import torch.nn.functional as F


def queue_push_(storage, keys, position, filled, normalize):
    """Write `keys` into the ring `storage` from `position` on; docs/moco.md is the contract.

    Args:
        storage: (K, D) floating, overwritten.
        keys: (B, D) floating, oldest first.
        position, filled: 0-d int64: the next row, and how many rows hold keys. Both are advanced.
        normalize: L2-normalise each key first.
    """
    keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
    if normalize:
        keys = F.normalize(keys, dim=1)
    for key in keys:
        storage[position.item()] = key.to(storage.dtype)
        position.copy_((position + 1) % len(storage))
        filled.copy_((filled + 1).clamp(max=len(storage)))
