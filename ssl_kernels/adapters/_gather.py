"""Rows of all processes, for losses that gather them as the libraries do."""

import torch
from torch import distributed as dist

from ssl_kernels.ops.library import in_turn


def world_size():
    """Number of processes, 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class _Gather(torch.autograd.Function):
    """Rows of every process, one process after the other; the gradient of a row is the sum of what all have for it."""

    @staticmethod
    def forward(ctx, rows):
        gathered = rows.new_empty(world_size(), *rows.shape)
        dist.all_gather(list(gathered), rows.contiguous())
        return gathered.flatten(0, 1)

    @staticmethod
    def backward(ctx, grad):
        return in_turn(_own_part, grad)[0]


def _own_part(grad):
    grad = grad.clone(memory_format=torch.contiguous_format)  # it may be another tensor's gradient too
    dist.all_reduce(grad)
    return (grad.chunk(world_size())[rank()],)


def gather_rows(rows):
    """(W · B, ...) with a gradient, of (B, ...) from each of W processes."""
    return _Gather.apply(rows) if world_size() > 1 else rows


@torch.no_grad()
def gather_constant(rows):
    """The same without a gradient."""
    return _Gather.apply(rows) if world_size() > 1 else rows
