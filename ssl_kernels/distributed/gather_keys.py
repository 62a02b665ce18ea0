"""Training over several processes with torch.distributed."""

import torch
from torch import distributed as dist

from ssl_kernels.checks import DTYPES, short


@torch.no_grad()
def gather_keys(keys, queue=None, *, group=None, check=True):
    """The keys of all ranks, one rank after the other: what every rank pushes, so that all queues stay equal.

        queue.push_(gather_keys(keys, queue))

    Args:
        keys: (B, D) floating, of this rank; the same shape and dtype on every rank.
        queue: The `nn.MoCoQueue` they will be pushed to, or None. With it the ranks' position and fill count are
            compared.
        group: Process group; None is the default one.
        check: Compare the ranks first. On CUDA that waits for the device; without it ranks that differ hang or corrupt
            the result, as torch.distributed does then.

    Returns:
        (world size · B, D) without a gradient, the same on every rank.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError, ValueError: keys is no (B, D) floating tensor: raised on the ranks where that is so, before they
            meet the others, who wait for them as torch.distributed does.
        ValueError: The ranks differ: raised on every rank.
    """
    op = "gather_keys"
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(f"{op}: torch.distributed must be initialised (init_process_group)")
    if not isinstance(keys, torch.Tensor) or keys.dtype not in DTYPES:
        raise TypeError(f"{op}: keys must be a floating tensor, got {getattr(keys, 'dtype', type(keys))}")
    if keys.dim() != 2:
        raise ValueError(f"{op}: keys must have shape (B, D), got {tuple(keys.shape)}")
    if check:
        _check_ranks_agree(op, keys, queue, group)
    world = dist.get_world_size(group)
    gathered = keys.new_empty(world * len(keys), keys.shape[1])
    if gathered.numel():
        dist.all_gather(list(gathered.chunk(world)), keys.contiguous(), group=group)
    return gathered


def _check_ranks_agree(op, keys, queue, group):
    """Raise on every rank if the number of keys, their width or dtype, or the state of the queue differs."""
    mine = {
        "rows of keys": len(keys),
        "width of keys": keys.shape[1],
        "dtype of keys": DTYPES.index(keys.dtype),
    }
    names = ("queue size", "queue position", "queue fill count")
    state = (-1, -1, -1)
    if queue is not None:
        state = (len(queue.storage), int(queue.position), int(queue.filled))
    mine |= dict(zip(names, state, strict=True))
    header = torch.tensor(list(mine.values()), device=keys.device)
    headers = [torch.empty_like(header) for _ in range(dist.get_world_size(group))]
    dist.all_gather(headers, header, group=group)
    for name, of_ranks in zip(mine, torch.stack(headers, 1).tolist(), strict=True):
        if len(set(of_ranks)) > 1:
            if name == "dtype of keys":
                of_ranks = [short(DTYPES[code]) for code in of_ranks]
            raise ValueError(f"{op}: {name} must be the same on every rank, got {of_ranks}")
