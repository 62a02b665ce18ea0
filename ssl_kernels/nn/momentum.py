"""The momentum encoder of MoCo, BYOL and their kin: a slow average of a module."""

import copy
import math

import torch
from torch import nn

from ssl_kernels.checks import is_number
from ssl_kernels.ops.momentum_update import HALF, momentum_update_

BUFFER_POLICIES = ("copy", "average")


def cosine_momentum(step, steps, base):
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
    not move. Such parameters get a float32 master, a buffer of this module, and are rounded from it after each
    update; what is written into them from outside replaces the master. Memory is written in place and never replaced
    by another tensor, as a captured CUDA graph needs it.

    Args:
        module: Copied, with its mode and devices. Its parameters stay as they are; those of the copy need no gradient.
        momentum: m in [0, 1].
        steps: With it the momentum rises from `momentum` to 1 along half a cosine over that many updates, as in BYOL.
        buffers: What happens to buffers that are floating or complex, such as the statistics of batch normalisation:
            "copy" takes those of `module` at each update, "average" averages them as the parameters. Integer buffers
            are copied. Complex averages are held in their own precision.
        backend: Of the kernel that moves the masters: "native", "triton", "chunked" or "reference"; None picks.

    Source: He et al., MoCo, arXiv:1911.05722, eq. 2.
    """

    def __init__(self, module, momentum=0.999, *, steps=None, buffers="copy", backend=None):
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"MomentumEncoder: module must be an nn.Module, got {type(module).__name__}")
        _check_momentum(momentum)
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
            raise ValueError(f"MomentumEncoder: steps must be a whole number from 1 or None, got {steps!r}")
        if buffers not in BUFFER_POLICIES:
            raise ValueError(f'MomentumEncoder: buffers must be "copy" or "average", got {buffers!r}')
        self.momentum = float(momentum)
        self.steps = steps
        self.buffer_policy = buffers
        self.backend = backend
        self.updates = 0
        self.module = copy.deepcopy(_unwrapped(module)).requires_grad_(False)
        self.masters = nn.Module()
        self._set_masters(self._averaged())

    @torch.no_grad()
    def forward(self, *args, **options):
        """The averaged module's result, without a gradient."""
        return self.module(*args, **options)

    @property
    def current_momentum(self):
        """The momentum of the next update."""
        if self.steps is None:
            return self.momentum
        return cosine_momentum(self.updates, self.steps, self.momentum)

    @torch.no_grad()
    def update_(self, module, momentum=None):
        """Move the average towards `module`, in place. Returns self.

        Args:
            module: As the one it was made from, in any floating dtype; may be wrapped for data parallelism or compiled.
            momentum: Of this update, instead of `current_momentum`.

        Raises:
            ValueError: `module` has other parameters or buffers than the copy, or momentum lies outside [0, 1].
        """
        momentum = self.current_momentum if momentum is None else momentum
        _check_momentum(momentum)
        momentum = float(momentum)
        module = _unwrapped(module)
        given = dict(module.named_parameters()) | dict(module.named_buffers())
        own = dict(self.module.named_parameters()) | dict(self.module.named_buffers())
        _check_same_tensors(own, given)
        averaged = self._averaged()
        masters = self._masters(averaged)
        sources = {name: given[name].to(average.device) for name, average in averaged.items()}
        wide = [name for name in averaged if name not in masters]
        if wide:
            averages = [averaged[name] for name in wide]
            targets = [sources[name].to(averaged[name].dtype) for name in wide]
            torch._foreach_lerp_(_as_real(averages), _as_real(targets), 1 - momentum)
        self._update_shadows(masters, averaged, sources, momentum)
        for name, tensor in own.items():
            if name not in averaged:
                tensor.copy_(given[name])
        self.updates += 1
        return self

    def _update_shadows(self, masters, averaged, sources, momentum):
        """Move the masters, by name, and the half-precision averages that are rounded from them."""
        for device in {master.device for master in masters.values()}:
            names = [name for name, master in masters.items() if master.device == device]
            own = [masters[name] for name in names]
            # An average that is a part of a larger tensor is updated in a copy with the layout of its master.
            shadows = [
                averaged[name]
                if averaged[name].stride() == masters[name].stride()
                else averaged[name].clone()
                for name in names
            ]
            targets = [
                sources[name] if sources[name].dtype in HALF else sources[name].float() for name in names
            ]
            momentum_update_(own, shadows, targets, momentum, backend=self.backend)
            for name, shadow in zip(names, shadows, strict=True):
                if shadow is not averaged[name]:
                    averaged[name].copy_(shadow)

    def _averaged(self):
        """The tensors of the copy that are averages, by name."""
        tensors = dict(self.module.named_parameters())
        if self.buffer_policy == "average":
            tensors |= dict(self.module.named_buffers())
        return {name: tensor for name, tensor in tensors.items() if _is_inexact(tensor)}

    def _masters(self, averaged):
        """The masters of those that have one, by name."""
        buffers = dict(self.masters.named_buffers())
        return {name: buffers[str(i)] for i, name in enumerate(averaged) if str(i) in buffers}

    def _set_masters(self, values):
        """Give every half-precision average a float32 master with the value of its name."""
        self.masters = nn.Module()
        for i, (name, tensor) in enumerate(self._averaged().items()):
            if tensor.dtype in HALF:
                self.masters.register_buffer(
                    str(i), values[name].detach().to(tensor.device, torch.float32, copy=True)
                )

    def _apply(self, fn, recurse=True):
        # A change of dtype reaches the copy; masters follow its device alone. The copy takes their values.
        averaged = self._averaged()
        masters = self._masters(averaged)
        with torch.no_grad():
            exact = {name: _exact(master, averaged[name]) for name, master in masters.items()}
        values = {name: exact.get(name, tensor.detach()) for name, tensor in averaged.items()}
        super()._apply(fn, recurse)
        self._set_masters(values)
        with torch.no_grad():
            averaged = self._averaged()
            for name, value in (self._masters(averaged) | exact).items():
                averaged[name].copy_(value)
        return self

    def get_extra_state(self):
        return {"updates": self.updates}

    def set_extra_state(self, state):
        self.updates = state["updates"]

    def extra_repr(self):
        return f"momentum={self.momentum}, steps={self.steps}, buffers={self.buffer_policy!r}"


def _unwrapped(module):
    """The module inside a compiled or data-parallel one."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(module, wrappers) or hasattr(module, "_orig_mod"):
        module = module.module if isinstance(module, wrappers) else module._orig_mod
    return module


def _is_inexact(tensor):
    return tensor.is_floating_point() or tensor.is_complex()


def _as_real(tensors):
    return [
        torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor for tensor in tensors
    ]


def _exact(master, rounded):
    """The master, except where `rounded` was written from outside since it was rounded from the master."""
    return torch.where(master.to(rounded.dtype) == rounded, master, rounded.to(master.dtype))


def _check_momentum(momentum):
    if not is_number(momentum):
        raise TypeError(f"MomentumEncoder: momentum must be a number, got {type(momentum).__name__}")
    if not 0 <= momentum <= 1:
        raise ValueError(f"MomentumEncoder: momentum must lie in [0, 1], got {momentum}")


def _check_same_tensors(own, given):
    if own.keys() != given.keys():
        missing, surplus = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
        raise ValueError(
            "MomentumEncoder: module must have the parameters and buffers of the copy,"
            f" got none named {missing} and surplus {surplus}"
        )
    for name, tensor in own.items():
        if tensor.shape != given[name].shape:
            raise ValueError(
                f"MomentumEncoder: {name} of module must have shape {tuple(tensor.shape)},"
                f" got {tuple(given[name].shape)}"
            )
