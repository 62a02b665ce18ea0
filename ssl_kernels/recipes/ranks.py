"""The processes that train together, as torchrun starts them."""

import dataclasses
import functools
import inspect
import os

import torch
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from ssl_kernels import distributed, triplet_loss
from ssl_kernels.distributed.groups import all_reduce


@dataclasses.dataclass(frozen=True)
class Ranks:
    """This process's rank among `size`."""

    rank: int = 0
    size: int = 1

    def own(self, batch):
        """This rank's rows of a `Batch` that every rank has made."""
        return batch if self.size == 1 else batch.parts(self.size)[self.rank]

    def mean(self, value):
        """Of a 0-d tensor over the ranks, as a number."""
        if self.size > 1:
            dist.all_reduce(value)
        return value.item() / self.size

    def any(self, flag, device):
        """Whether the flag is true on any rank."""
        if self.size == 1:
            return flag
        flags = torch.tensor(float(flag), device=device)
        dist.all_reduce(flags)
        return flags.item() > 0


ALONE = Ranks()


def join(device):
    """(ranks, device): join those that torchrun has started, each with its own GPU where the device is "cuda"."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return Ranks(dist.get_rank(), size), device


def leave():
    """After the last step; without other ranks there is nothing to do."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def over_ranks(loss):
    """The loss over the rows of all ranks, where it takes a group or `ssl_kernels.distributed` has it; else `loss`
    itself, which every rank takes over its own rows."""
    if loss is triplet_loss:
        # Over ranks it mines batch-hard alone; every rank takes all rows to itself instead.
        def of_all_rows(embeddings, labels, *args, **options):
            return loss(*map(distributed.gather_rows, (embeddings, labels)), *args, **options)

        return functools.wraps(loss)(of_all_rows)
    if "group" in inspect.signature(loss).parameters:
        # Asks for the group at each call: what holds a group cannot be copied.
        return functools.wraps(loss)(lambda *args, **options: loss(*args, group=dist.group.WORLD, **options))
    return getattr(distributed, getattr(loss, "__name__", ""), loss)


def gathered(keys):
    """The keys of all ranks, which every rank pushes to its queue."""
    return distributed.gather_keys(keys) if dist.is_available() and dist.is_initialized() else keys


class GlobalBatchNorm(_BatchNorm):
    """Batch normalisation by the statistics of the rows of all ranks, on any device."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        name = dist.group.WORLD.group_name
        over = [dim for dim in range(x.dim()) if dim != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        rows = all_reduce(x.new_tensor([x.numel() / x.shape[1]]), name)
        mean = all_reduce(x.sum(over), name) / rows
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(over), name) / rows
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * rows / (rows - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias.view(shape), centred, scale.view(shape))


def with_global_batch_norm(model):
    """`model` itself, whose batch normalisation looks at the rows of all ranks from now on."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = GlobalBatchNorm
    return model
