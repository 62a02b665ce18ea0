"""Process groups, and the collectives on rows that the losses are made of."""

from typing import NamedTuple

import torch
from torch import distributed as dist

from ssl_kernels.ops.library import in_turn


class Ranks(NamedTuple):
    """A process group as this rank sees it."""

    rank: int
    world: int
    name: str  # by which functional collectives find the group


def process_group(op, group):
    """`group` as a ProcessGroup of this rank: None is the default one, a DeviceMesh has to have one dimension.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError, ValueError: group is no process group, or one without this rank.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(f"{op}: torch.distributed must be initialised (init_process_group)")
    if group is None:
        return dist.group.WORLD
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"{op}: group must contain this rank, got a group of others")
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise ValueError(f"{op}: group must have one dimension as a DeviceMesh, got {group.ndim}")
        return group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{op}: group must be a process group or None, got {type(group).__name__}")
    return group


def ranks_of(op, group):
    """(process group, `Ranks`) of what `process_group` takes."""
    group = process_group(op, group)
    return group, Ranks(dist.get_rank(group), dist.get_world_size(group), group.group_name)


def device_of(group):
    """Where a message of this group may lie whatever the data is: the CPU if its backends have one for it."""
    backend = dist.get_backend(group)
    names = {backend} | set(str(dist.get_backend_config(group)).replace(":", ",").split(","))
    if names & {"gloo", "mpi", "cpu", "fake"}:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def _collective(name):
    return getattr(torch.ops._c10d_functional, name)


def _wait(tensor):
    return torch.ops._c10d_functional.wait_tensor(tensor)


def _padded(x, rows):
    """x with zeros below, `rows` rows in all: a collective moves as much from every rank."""
    if x.shape[0] == rows:
        return x.contiguous()
    return torch.cat((x, x.new_zeros(rows - x.shape[0], *x.shape[1:])))


def wait(started):
    """What a collective that was `start_`ed brings."""
    return _wait(started)


def start_all_gather(x, sizes, name):
    """Rows of all ranks; sizes are their numbers of rows. Not differentiable."""
    return _collective("all_gather_into_tensor")(_padded(x, max(sizes)), len(sizes), name)


def all_gather_rows(x, sizes, name):
    """Rows of all ranks, rank after rank; sizes are their numbers of rows. Not differentiable."""
    most = max(sizes)
    gathered = _wait(start_all_gather(x, sizes, name))
    if min(sizes) == most:
        return gathered
    return torch.cat([gathered[rank * most : rank * most + size] for rank, size in enumerate(sizes)])


def rows_of_others(started, sizes, rank):
    """Of what `start_all_gather` brings the rows of the other ranks: from rank + 1 on, and behind the last rank 0."""
    gathered, most, world = _wait(started), max(sizes), len(sizes)
    if min(sizes) == most:
        spans = [(rank + 1, world), (0, rank)]
        parts = [gathered[first * most : last * most] for first, last in spans if first < last]
    else:
        order = [(rank + k) % world for k in range(1, world)]
        parts = [gathered[other * most : other * most + sizes[other]] for other in order]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def start_reduce_scatter(x, sizes, name):
    """The sum over the ranks of x, which has all ranks' rows in their order: this rank's, with padding below."""
    most, world = max(sizes), len(sizes)
    if min(sizes) != most:
        x = torch.cat([_padded(rows, most) for rows in x.split(list(sizes))])
    return _collective("reduce_scatter_tensor")(x.contiguous(), "sum", world, name)


def start_all_to_all(x, received, sent, name):
    """Rows of x, `sent[q]` of them to each rank q in turn; what comes, `received[q]` of each."""
    return _collective("all_to_all_single")(x.contiguous(), list(received), list(sent), name)


def all_to_all_rows(x, received, sent, name):
    """What `start_all_to_all` brings."""
    return _wait(start_all_to_all(x, received, sent, name))


def start_exchange(x, sizes, rank, name):
    """(world - 1) * own rows: what each other rank has of this rank's rows in x, where those of its others lie."""
    own, world = sizes[rank], len(sizes)
    received, sent = [own] * world, list(sizes)
    received[rank] = sent[rank] = 0
    return start_all_to_all(x, received, sent, name)


class _AllReduce(torch.autograd.Function):
    """The sum over the ranks; every rank's gradient of it reaches every rank's input."""

    @staticmethod
    def forward(ctx, x, name):
        ctx.name = name
        return _wait(_collective("all_reduce")(x.contiguous(), "sum", name))

    @staticmethod
    def backward(ctx, grad):
        (made,) = in_turn(lambda grad: (_AllReduce.apply(grad, ctx.name),), grad)
        return made, None


def all_reduce(x, name):
    """The sum of x over the ranks, differentiable."""
    return _AllReduce.apply(x, name)


def all_reduce_lse(lse, name):
    """The log-sum-exp over the ranks of what each of them has, not differentiable."""
    reduce = _collective("all_reduce")
    top = _wait(reduce(lse.contiguous(), "max", name))
    shift = top.masked_fill(top.isinf(), 0)
    return shift + _wait(reduce((lse - shift).exp(), "sum", name)).log()
