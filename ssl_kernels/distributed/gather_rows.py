"""The rows of all ranks on every rank."""

from typing import TYPE_CHECKING, Any

import torch

from ssl_kernels.checks import check_dtype, shape_error, short
from ssl_kernels.distributed import checks, groups
from ssl_kernels.distributed.once import once
from ssl_kernels.distributed.transport import Sum
from ssl_kernels.ops.library import accumulation_dtype

if TYPE_CHECKING:
    from ssl_kernels.nn.queue import MoCoQueue


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, sizes, rank, name):
        ctx.options = sizes, rank, name
        return groups.all_gather_rows(rows, sizes, name)

    @staticmethod
    @once
    def backward(ctx, grad):
        sizes, rank, name = ctx.options
        start = sum(sizes[:rank])
        before, own, behind = grad.to(accumulation_dtype(grad)).tensor_split((start, start + sizes[rank]))
        started = Sum.send([torch.cat((before, behind))], sizes, rank, name)
        (summed,) = Sum.receive(started, [own.clone()], sizes, rank)
        return summed.to(grad.dtype), None, None, None


def gather_rows(rows: torch.Tensor, *, group: Any = None, check: bool = True) -> torch.Tensor:
    """The rows of all ranks, one rank after the other, with a gradient: for losses that have no form over ranks.

        loss = ssl_kernels.triplet_loss(gather_rows(embeddings), gather_rows(labels), mining="semi_hard")

    Every rank then computes the loss of the global batch, and calls backward. The gradient of a row is the sum of what
    all ranks have for it; DistributedDataParallel and fully_shard average, so that each parameter gets its gradient of
    that loss once.

    Args:
        rows: (B, ...) of this rank; the same shape behind B and the same dtype on every rank, and any B, 0 as well. In
            a compiled function B is the same too.
        group: Process group or DeviceMesh; None is the default group.
        check: Compare the ranks first. On CUDA that waits for the device. Without it they tell each other their
            numbers of rows alone, and in a compiled function nothing.

    Returns:
        (sum of the ranks' B, ...), the same on every rank. It has no second derivative.

    Raises:
        RuntimeError: torch.distributed is not initialised. In a compiled function, with check: the ranks' B differ.
        TypeError, ValueError: rows is no tensor, or has no dimension. With check the other ranks raise as well.
        ValueError: The ranks differ: raised on every rank.
    """
    return _gather("gather_rows", "rows", rows, group, check, _check_rows)


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
    return _gather("gather_keys", "keys", keys, group, check, _check_keys, queue)


def _check_rows(op, name, rows):
    if not isinstance(rows, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(rows).__name__}")
    if not rows.dim():
        raise ValueError(f"{op}: {name} must have shape (B, ...), got ()")


def _check_keys(op, name, keys):
    check_dtype(op, name, keys)
    if keys.dim() != 2:
        raise shape_error(op, name, "(B, D)", keys)


def _gather(op, name, rows, group, check, check_own, queue=None):
    group, ranks = groups.ranks_of(op, group)
    compiling = torch.compiler.is_compiling()
    with checks.refusing(op, group, ranks, check and not compiling):
        check_own(op, name, rows)
        checks.check_device_of_group(op, name, rows, group)
    if compiling:
        sizes = [rows.shape[0]] * ranks.world
        if check:
            rule = f"{name} must be equally many on every rank in a compiled function"
            checks.assert_counts(op, None, sizes[:1], rows, ranks, rule)
    elif check:
        facts = {
            "_rows": rows.shape[0],
            f"width of {name}": rows.shape[1] if rows.dim() == 2 else list(rows.shape[1:]),
            f"dtype of {name}": short(rows.dtype),
            f"requires_grad of {name}": rows.requires_grad and torch.is_grad_enabled(),
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
        sizes = [count for (count,) in checks.exchange_counts([rows.shape[0]], group, ranks)]
    if not sum(sizes):
        return rows.clone()
    return _GatherRows.apply(rows, sizes, ranks.rank, ranks.name)
