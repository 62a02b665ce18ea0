"""The keys of all ranks, for a queue that every rank holds."""

from typing import TYPE_CHECKING, Any

import torch

from ssl_kernels.checks import check_dtype, short
from ssl_kernels.distributed import checks, groups

if TYPE_CHECKING:
    from ssl_kernels.nn.queue import MoCoQueue


@torch.no_grad()
def gather_keys(
    keys: torch.Tensor, queue: "MoCoQueue | None" = None, *, group: Any = None, check: bool = True
) -> torch.Tensor:
    """The keys of all ranks, one rank after the other: what every rank pushes, so that all queues stay equal.

        queue.push_(gather_keys(keys, queue))

    Args:
        keys: (B, D) floating, of this rank; the same D and dtype on every rank, and any B, 0 as well.
        queue: The `nn.MoCoQueue` they will be pushed to, or None. With it the ranks' size, position and fill count are
            compared.
        group: Process group or DeviceMesh; None is the default group.
        check: Compare the ranks first. On CUDA that waits for the device. Without it they tell each other their
            numbers of keys alone.

    Returns:
        (sum of the ranks' B, D) without a gradient, the same on every rank.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError, ValueError: keys is no (B, D) floating tensor. With check the other ranks raise as well.
        ValueError: The ranks differ: raised on every rank.
    """
    op = "gather_keys"
    group, ranks = groups.ranks_of(op, group)
    with checks.refusing(op, group, ranks, check):
        check_dtype(op, "keys", keys)
        if keys.dim() != 2:
            raise ValueError(f"{op}: keys must have shape (B, D), got {tuple(keys.shape)}")
        checks.check_device_of_group(op, "keys", keys, group)
    if check:
        facts = {
            "_rows": keys.shape[0],
            "width of keys": keys.shape[1],
            "dtype of keys": short(keys.dtype),
            "queue": queue is not None,
        }
        if queue is not None:
            facts |= {
                "queue size": queue.storage.shape[0],
                "queue position": int(queue.position),
                "queue fill count": len(queue),
            }
        sizes = [theirs["_rows"] for theirs in checks.compare(op, group, ranks, facts)]
    else:
        sizes = [rows for (rows,) in checks.exchange_counts([keys.shape[0]], group, ranks)]
    if not sum(sizes):
        return keys.clone()
    return groups.all_gather_rows(keys, sizes, ranks.name)
