"""Tensors and modules that `fully_shard` has sharded, beside those that it has not."""

import sys

import torch
from torch import nn

PLAIN = (torch.Tensor, nn.Parameter)  # of these types no tensor is sharded


def is_sharded(tensor):
    return type(tensor) not in PLAIN and hasattr(tensor, "placements")


def local_of(tensor):
    """The shard of a sharded tensor, else the tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def locals_of(tensors):
    return [tensor if type(tensor) in PLAIN else local_of(tensor) for tensor in tensors]


def placed_as(tensor, like):
    """`tensor` where `like` is: on its device, and sharded as it is."""
    if type(tensor) in PLAIN and type(like) in PLAIN:
        return tensor.to(like.device)
    if not is_sharded(like):
        return (tensor.full_tensor() if is_sharded(tensor) else tensor).to(like.device)
    mesh, placements = like.device_mesh, like.placements
    if is_sharded(tensor):
        same = tensor.device_mesh == mesh and tensor.placements == placements
        return tensor if same else tensor.redistribute(mesh, placements)
    from torch.distributed.tensor import distribute_tensor  # of which a process without shards has no need

    return distribute_tensor(tensor.detach().to(like.device), mesh, placements, src_data_rank=None)


def sharded_parts(module):
    """What `fully_shard` was applied to in and around `module`."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    # The only way from a part to what holds it.
    from torch.distributed._composable_state import _module_state_mapping

    parts = [part for part in list(_module_state_mapping) if isinstance(part, fsdp.FSDPModule)]
    inside = set(module.modules() if parts else ())
    return [part for part in parts if not inside.isdisjoint(part.modules())]


def reshard(module):
    """Have what `fully_shard` was applied to hold its shards.

    After a forward without gradients parameters stay gathered copies, and what is written into those is lost.
    """
    for part in sharded_parts(module):
        part.reshard()


def check_not_in_forward(module):
    """Within a forward that needs them, parameters stay gathered copies for all that `reshard` does."""
    for sharded in sharded_parts(module):
        inside = set(module.modules())
        parts = [sharded] if sharded._get_fsdp_state()._training_state.name == "FORWARD" else []
        while parts:
            part = parts.pop()
            parts += [child for child in part.children() if not hasattr(child, "reshard")]
            if part in inside and not all(map(is_sharded, part.parameters(recurse=False))):
                raise ValueError(
                    "MomentumEncoder: update_ must be called outside of the forward of what fully_shard was applied to,"
                    f" got one in that of {type(sharded).__name__}; or shard both encoders by themselves"
                )
