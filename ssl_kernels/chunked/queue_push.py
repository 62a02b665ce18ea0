"""`queue_push_` in plain PyTorch, without waiting for the device. docs/moco.md is the contract."""

import torch

from ssl_kernels.chunked.rows import unit_rows, without_autocast


@without_autocast
def queue_push_(storage, keys, position, filled, normalize):
    size, batch = len(storage), len(keys)
    kept = unit_rows(keys[max(0, batch - size) :], normalize)[0]
    rows = (position + torch.arange(batch - len(kept), batch, device=storage.device)) % size
    storage.index_copy_(0, rows, kept.to(storage.dtype))
    position.add_(batch).remainder_(size)
    filled.add_(batch).clamp_(max=size)
