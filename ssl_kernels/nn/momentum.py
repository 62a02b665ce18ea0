"""The momentum encoder of MoCo, BYOL and their kin: a slow average of a module."""

import copy
import math
import sys
from typing import Any, Self

import torch
from torch import nn

from ssl_kernels import backends
from ssl_kernels.checks import (
    check_choice,
    check_fraction,
    check_whole,
    shape_error,
    short,
    values_are_readable,
)
from ssl_kernels.nn.counters import after_apply
from ssl_kernels.nn.shards import (
    PLAIN,
    check_not_in_forward,
    is_sharded,
    local_of,
    locals_of,
    placed_as,
    reshard,
)
from ssl_kernels.nn.wrapped import parts_of, tensors_of, unwrapped
from ssl_kernels.ops.momentum_update import HALF, momentum_update_

BUFFER_POLICIES = ("copy", "average")
AVERAGED = (torch.float64, torch.float32, *HALF, torch.complex128, torch.complex64, torch.complex32)


def cosine_momentum(step: int, steps: int, base: float) -> float:
    """The momentum of update `step` out of `steps`: from `base` at 0 along half a cosine to 1 at the end and after.

    Source: Grill et al., BYOL, arXiv:2006.07733, section 3.3.
    """
    return 1 - (1 - base) * (math.cos(math.pi * min(step, steps) / steps) + 1) / 2


class MomentumEncoder(nn.Module):
    """An exponential moving average of a module: ξ ← m ξ + (1 − m) θ for each parameter at each `update_(module)`.

        key_encoder = MomentumEncoder(encoder, momentum=0.999)
        keys = key_encoder(images)          # no gradient
        optimizer.step()
        key_encoder.update_(encoder)

    The average is held in float32 (float64 for float64 parameters), also where parameters are float16 or bfloat16:
    there a step of less than half a unit in the last place is lost, and from m = 0.996 on an average in bfloat16 does
    not move. Such parameters get a float32 master, part of the state, and are rounded from it after each update; what
    is written into them from outside replaces the master. Memory is written in place and never replaced by another
    tensor, as a captured CUDA graph needs it. The number of updates is counted on the device: no update waits for it.

    The state is made of tensors. Checkpoints of float32, bfloat16 and float16 averages load into each other, and so do
    those that lack masters or the count: the masters are the weights then, and the count stays as it is.

    Sharded by `fully_shard`, the shards are averaged. The average is made first, since a sharded module cannot be
    copied; then `module` or both are sharded. `update_` gathers the parameters where only one of the two is sharded, so
    every rank calls it.

    Args:
        module: Copied, with its mode and devices. Its parameters stay as they are; those of the copy need no gradient.
        momentum: m in [0, 1].
        steps: With it the momentum rises from `momentum` to 1 along half a cosine over that many updates, as in BYOL.
        buffers: What happens to buffers that are floating or complex, such as the statistics of batch normalisation:
            "copy" takes those of `module` at each update, "average" averages them as the parameters. Integer buffers
            are copied. Complex averages are held in their own precision. A buffer whose shape has changed in `module`,
            or that came or went there, is taken over as it is.
        backend: Of the kernel that moves the masters: "native", "triton", "chunked" or "reference"; None picks.

    Source: He et al., MoCo, arXiv:1911.05722, eq. 2.
    """

    def __init__(
        self,
        module: nn.Module,
        momentum: float = 0.999,
        *,
        steps: int | None = None,
        buffers: str = "copy",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"MomentumEncoder: module must be an nn.Module, got {type(module).__name__}")
        check_fraction("MomentumEncoder", "momentum", momentum)
        check_whole("MomentumEncoder", "steps", steps, 1, optional=True)
        check_choice("MomentumEncoder", "buffers", buffers, *BUFFER_POLICIES)
        backends.check_name("MomentumEncoder", backend)
        module = unwrapped(module)
        _check_can_be_copied(module)
        self.momentum = float(momentum)
        self.steps = None if steps is None else int(steps)
        self.buffer_policy = buffers
        self.backend = backend
        # No child: what is a buffer of some part of a model is broadcast by DistributedDataParallel at each forward.
        object.__setattr__(self, "masters", nn.Module())
        with torch.inference_mode(False), torch.no_grad():
            self.module = copy.deepcopy(module).requires_grad_(False)
            _make_writable(self.module)
            parameters, own_buffers, _, _ = self._settle()
            device = next(iter((parameters | own_buffers).values()), torch.empty(0, device="cpu")).device
            self.register_buffer("update_count", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def forward(self, *args: Any, **options: Any) -> Any:
        """The averaged module's result, without a gradient."""
        return self.module(*args, **options)

    @property
    def updates(self) -> int:
        """How many updates there were; may be set. Reading it waits for the device."""
        return int(self.update_count)

    @updates.setter
    def updates(self, count: int) -> None:
        self.update_count.fill_(count)

    @property
    def current_momentum(self) -> float:
        """The momentum of the next update. With `steps` it waits for the device."""
        if self.steps is None:
            return self.momentum
        return cosine_momentum(self.updates, self.steps, self.momentum)

    @torch.no_grad()
    def update_(self, module: nn.Module, momentum: float | None = None) -> Self:
        """Move the average towards `module`, in place. Returns self.

        Args:
            module: As the one it was made from, in any floating dtype and layout; it or parts of it may be wrapped for
                compilation, activation checkpointing or data parallelism.
            momentum: Of this update, instead of `current_momentum`: a number.

        Raises:
            TypeError, ValueError: `module` has other parameters than the copy, or tensors that cannot be averaged or
                copied into its; momentum outside [0, 1]; a backend that cannot run. Nothing was written then.
        """
        check_fraction("MomentumEncoder", "momentum", self.momentum if momentum is None else momentum)
        if not torch.compiler.is_compiling():
            for each in (self, module):
                reshard(each)
                check_not_in_forward(each)
        parameters, buffers, averaged, masters = self._settle()
        given_parameters, given_buffers = tensors_of(module)
        _check_parameters(parameters, given_parameters)
        given = given_parameters | given_buffers
        if not torch.compiler.is_compiling():
            _check_tensors(parameters | buffers, given, averaged)
        devices = {master.device: master for master in masters.values()}
        for master in devices.values():
            backends.choose_backend("momentum_update", self.backend, "MomentumEncoder", local_of(master))
        like = given | buffers | parameters
        sources = {name: placed_as(tensor, like[name]) for name, tensor in given.items()}
        if _shapes(buffers) != _shapes(given_buffers):
            parameters, buffers = self._take_over_buffers(module, buffers, given_buffers)
            averaged = self._averaged(parameters, buffers)
            masters = self._masters(averaged)

        momentum = self._momentum(momentum)
        for device in devices:
            here = masters
            if len(devices) > 1:
                here = {name: master for name, master in masters.items() if master.device == device}
            self._update_masters(here, averaged, sources, momentum)
        wide = [name for name in averaged if name not in masters]
        if wide:
            averages = _as_real(locals_of([averaged[name] for name in wide]))
            targets = [local_of(sources[name]).to(averaged[name].dtype) for name in wide]
            weight = 1 - momentum
            if isinstance(weight, torch.Tensor):
                kinds = {(average.dtype, average.device): average for average in averages}
                weights = {kind: weight.to(average) for kind, average in kinds.items()}
                weight = [weights[average.dtype, average.device] for average in averages]
            torch._foreach_lerp_(averages, _as_real(targets), weight)
        for name, tensor in (parameters | buffers).items():
            if name not in averaged:
                local_of(tensor).copy_(local_of(sources[name]))
        self.update_count.add_(1)
        return self

    def _momentum(self, momentum):
        """m of this update: a number or, where it changes from update to update, a 0-d tensor."""
        device = self.update_count.device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # which mps does not have
        if momentum is None and self.steps is not None:
            count = self.update_count
            if values_are_readable(count):
                return cosine_momentum(count.item(), self.steps, self.momentum)
            angle = count.clamp(max=self.steps).to(dtype) * (math.pi / self.steps)
            return 1 - (angle.cos() + 1) * ((1 - self.momentum) / 2)
        momentum = self.momentum if momentum is None else momentum
        if torch.compiler.is_compiling():  # a number would be compiled once for each of its values
            return torch.ones((), dtype=dtype, device=device) * momentum
        return float(momentum)

    def _update_masters(self, masters, averaged, sources, momentum):
        """Move masters of one device, by name, and the half-precision averages that are rounded from them."""
        own = locals_of(masters.values())
        averages = locals_of([averaged[name] for name in masters])
        # An average of another layout than its master is updated in a copy.
        shadows = [
            average
            if average.stride() == master.stride()
            else torch.empty_like(master, dtype=average.dtype).copy_(average)
            for average, master in zip(averages, own, strict=True)
        ]
        targets = locals_of([sources[name] for name in masters])
        targets = [target if target.dtype in HALF else target.float() for target in targets]
        if isinstance(momentum, torch.Tensor):
            momentum = momentum.to(own[0].device)
        momentum_update_(own, shadows, targets, momentum, backend=self.backend)
        for average, shadow in zip(averages, shadows, strict=True):
            if shadow is not average:
                average.copy_(shadow)

    def _averaged(self, parameters, buffers):
        """The tensors of the copy that are averages, by name."""
        tensors = parameters | buffers if self.buffer_policy == "average" else parameters
        return {name: tensor for name, tensor in tensors.items() if _is_inexact(tensor)}

    def _masters(self, averaged):
        """The masters of those that have one, by name."""
        masters = self.masters._buffers
        return {name: masters[str(i)] for i, name in enumerate(averaged) if str(i) in masters}

    def _settle(self):
        """Parameters, buffers, averages and masters of the copy by name, a master beside each half-precision average.

        The copy alone may have been cast, moved or sharded since.
        """
        parameters, buffers = tensors_of(self.module)
        averaged = self._averaged(parameters, buffers)
        masters = self._masters(averaged)
        if not torch.compiler.is_compiling():
            for name, tensor in averaged.items():
                master = masters.get(name)
                is_settled = (master is None) if tensor.dtype not in HALF else _fits(master, tensor)
                if not is_settled:
                    self._set_masters(averaged, masters)
                    masters = self._masters(averaged)
                    break
        return parameters, buffers, averaged, masters

    def _set_masters(self, averaged, values):
        """Give every half-precision average a float32 master, with the value of its name where there is one."""
        masters = nn.Module()
        with torch.inference_mode(False), torch.no_grad():
            for i, (name, tensor) in enumerate(averaged.items()):
                if tensor.dtype in HALF:
                    value = values.get(name, tensor)
                    value = value if value.shape == tensor.shape else tensor
                    value = placed_as(value.detach(), tensor).float()
                    masters.register_buffer(str(i), value)
        object.__setattr__(self, "masters", masters)

    def _take_over_buffers(self, module, buffers, given):
        """Give the copy the buffers of `module` that have another shape there, came or went."""
        own_parts, given_parts = parts_of(self.module), parts_of(module)
        changed = [
            name for name in {**buffers, **given} if _shapes(buffers).get(name) != _shapes(given).get(name)
        ]
        new = {}
        for name in changed:
            path, _, leaf = name.rpartition(".")
            if path not in own_parts:
                raise ValueError(
                    f"MomentumEncoder: module must have the parts of the copy, got a surplus {path}"
                )
            if name in given:
                like = buffers.get(name, given[name])
                device = like.device if name in buffers else self.update_count.device
                new[name] = torch.empty_like(given[name], dtype=like.dtype, device=device).copy_(given[name])
        masters = self._masters(self._averaged(tensors_of(self.module)[0], buffers))
        for name in changed:
            path, _, leaf = name.rpartition(".")
            _, part = own_parts[path]
            if name in new and leaf not in part._buffers:
                fleeting = leaf in given_parts[path][1]._non_persistent_buffers_set
                part.register_buffer(leaf, new[name], persistent=not fleeting)
            else:
                part._buffers[leaf] = new.get(name)
        parameters, buffers = tensors_of(self.module)
        self._set_masters(self._averaged(parameters, buffers), masters)
        return parameters, buffers

    def _apply(self, fn, recurse=True):
        reshard(self)
        # A change of dtype reaches the copy; masters follow in all but that. The copy takes their values.
        _, _, averaged, masters = self._settle()
        averaged = {name: tensor.detach() for name, tensor in averaged.items()}
        count = self.update_count
        super()._apply(fn, recurse)
        self.update_count = after_apply(count, self.update_count)
        new = self._averaged(*tensors_of(self.module))
        values = {}
        with torch.no_grad():
            for name, tensor in new.items():
                before, master = averaged[name], masters.get(name)
                if tensor.dtype == before.dtype:
                    if master is not None:
                        values[name] = fn(master)
                        if values[name].dtype != master.dtype:
                            values[name] = master.to(tensor.device)
                    continue
                exact = before if master is None else _exact(master, before)
                if tensor.dtype in HALF:
                    exact = values[name] = _laid_out_as(tensor, exact)
                if not tensor.is_meta:
                    tensor.copy_(exact)
            self._set_masters(new, values)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        reshard(self)
        self._settle()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for i, master in self.masters._buffers.items():
            destination[f"{prefix}masters.{i}"] = master

    @torch.no_grad()
    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        reshard(self)
        parameters, buffers, averaged, masters = self._settle()
        assign = local_metadata.get("assign_to_params_buffers", False)
        older = state_dict.pop(f"{prefix}_extra_state", None)  # a dict, when the count was no tensor
        if f"{prefix}update_count" not in state_dict:
            count = torch.tensor(older["updates"]) if isinstance(older, dict) else self.update_count
            state_dict[f"{prefix}update_count"] = count
        # Masters are numbered in the order of parameters and floating buffers, also where a buffer has none.
        inexact = [item for item in (parameters | buffers).items() if _is_inexact(item[1])]
        paths = {path: raw for path, (raw, _) in parts_of(self.module).items()}
        for i, (name, tensor) in enumerate(inexact):
            master = state_dict.pop(f"{prefix}masters.{i}", None)
            path, _, leaf = name.rpartition(".")
            keys = (f"{prefix}module.{part}{leaf}" for part in (path and f"{path}.", paths[path]))
            key = next((key for key in keys if key in state_dict), None)
            if key is None or state_dict[key].shape != tensor.shape:
                continue  # which the copy reports
            value = state_dict[key]
            if master is None:
                master = value
            elif master.shape == value.shape:
                master = _exact(placed_as(master, value), value)
            else:
                errors.append(
                    f"size mismatch for {prefix}masters.{i}: copying a param with shape {tuple(master.shape)} from"
                    f" checkpoint, the shape in current model is {tuple(value.shape)}."
                )
                continue
            if not assign and value.dtype != tensor.dtype:
                state_dict[key] = master.float() if tensor.dtype in HALF else master
            if name in averaged and (value if assign else tensor).dtype in HALF:
                if assign:
                    self.masters.register_buffer(str(i), master.detach().float().contiguous())
                else:
                    masters[name].copy_(placed_as(master, masters[name]))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, steps={self.steps}, buffers={self.buffer_policy!r}"


def _shapes(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def _is_inexact(tensor):
    return tensor.is_floating_point() or tensor.is_complex()


def _as_real(tensors):
    return [
        torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor for tensor in tensors
    ]


def _laid_out_as(tensor, value):
    """`value` in float32 on the device and with the strides of `tensor`."""
    new = torch.empty_like(tensor, dtype=torch.float32)
    return new if new.is_meta or value.is_meta else new.copy_(value)


def _exact(master, rounded):
    """The master, except where `rounded` was written from outside since it was rounded from the master."""
    return torch.where(master.to(rounded.dtype) == rounded, master, rounded.to(master.dtype))


def _fits(master, tensor):
    return (
        master is not None
        and master.shape == tensor.shape
        and master.device == tensor.device
        and ((type(master) in PLAIN and type(tensor) in PLAIN) or is_sharded(master) == is_sharded(tensor))
    )


def _make_writable(module):
    """Give buffers that hold an element more than once, such as expanded ones, memory for each of them."""
    for part in module.modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.layout == torch.strided and _overlaps(buffer):
                part._buffers[name] = buffer.contiguous()


def _overlaps(tensor):
    return not tensor.is_contiguous() and any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _check_can_be_copied(module):
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = () if fsdp is None else (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)
    if any(isinstance(part, sharded) for part in module.modules()):
        raise ValueError(
            "MomentumEncoder: module must not be sharded when it is copied, got a sharded one; make the"
            " MomentumEncoder first, then fully_shard module, or both module and MomentumEncoder.module"
        )
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if nn.parameter.is_lazy(tensor):
            raise ValueError(
                f"MomentumEncoder: module must have been run once before it is copied, got {name} without a shape"
            )


def _check_parameters(own, given):
    """`given` must be the parameters of the copy."""
    if own.keys() != given.keys():
        missing, surplus = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
        raise ValueError(
            "MomentumEncoder: module must have the parameters and buffers of the copy,"
            f" got none named {missing} and surplus {surplus}"
        )
    for name, tensor in own.items():
        if tensor.shape != given[name].shape:
            raise shape_error("MomentumEncoder", f"{name} of module", tuple(tensor.shape), given[name])


def _check_tensors(own, given, averaged):
    """Everything that would raise in the middle of an update."""
    inference = torch.is_inference_mode_enabled()
    for name, tensor in own.items():
        source = given.get(name)
        if source is None or tensor.shape != source.shape:
            continue  # a buffer that is taken over
        layout = tensor.layout
        if layout != source.layout or tensor.is_meta != source.is_meta:
            raise ValueError(
                f"MomentumEncoder: {name} of module must be {layout} on {tensor.device} as that of the copy,"
                f" got {source.layout} on {source.device}"
            )
        if source.is_complex() and not tensor.is_complex():
            raise TypeError(
                f"MomentumEncoder: {name} of module must be real as that of the copy, got {short(source.dtype)}"
            )
        if name in averaged and (tensor.dtype not in AVERAGED or layout != torch.strided):
            raise TypeError(
                f"MomentumEncoder: {name} must be dense and of 16 to 128 bits to be averaged,"
                f" got {short(tensor.dtype)}, {tensor.layout}"
            )
        if not inference and tensor.is_inference():
            raise ValueError(
                f"MomentumEncoder: {name} of the copy was made under torch.inference_mode and can be written only there"
            )
        if layout == torch.strided and _overlaps(tensor):
            raise ValueError(
                f"MomentumEncoder: {name} of the copy must hold each element once, got strides {tensor.stride()}"
            )
