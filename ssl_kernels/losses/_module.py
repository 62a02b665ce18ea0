"""What the losses are as modules: holders of the options of a function."""

from typing import Any

import torch
from torch import nn


class Loss(nn.Module):
    """Holds a loss function's options as attributes of their names.

    An `nn.Parameter` among them is learned; one without dimensions gets the shape (1,), as `fully_shard` demands, and
    checkpoints in which it has none load. Any other tensor is a buffer: it moves with the module and is in its
    `state_dict`. Where a `state_dict` does not have it, the module's own stays. A subclass names the options and their
    defaults in `__init__`, begins it with `super().__init__(locals())`, and passes `self.options` on in `forward`.
    """

    _names = ()

    def __init__(self, options: dict[str, Any]) -> None:
        """`options`: the arguments of the subclass's `__init__`, which are all of its `locals()`."""
        super().__init__()
        self._names = tuple(name for name in options if name not in ("self", "__class__"))
        for name in self._names:
            setattr(self, name, options[name])

    def __setattr__(self, name, value):
        if isinstance(value, nn.Parameter) and value.dim() == 0:
            value.data = value.data.reshape(1)  # the caller's own, which an optimizer may hold
        if name in self._names and name not in self._parameters:
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.__dict__.pop(name, None)
                self.register_buffer(name, value)
                return
            self._buffers.pop(name, None)
        super().__setattr__(name, value)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for name, buffer in self._buffers.items():
            state_dict.setdefault(prefix + name, buffer)  # in the copy that load_state_dict made
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            value = state_dict.get(prefix + name)
            if value is not None and value.numel() == own.numel() == 1:
                state_dict[prefix + name] = value.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def options_with(self, **given: Any) -> dict[str, Any]:
        """The options, those of `given` that are not None in the place of the module's own."""
        return self.options | {name: value for name, value in given.items() if value is not None}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items() if name != "backend")
