"""What the calls of all operations have: tensors among their fields."""

import dataclasses

import torch


class Tensors:
    """To be inherited by a dataclass."""

    def replace(self, **changes):
        return dataclasses.replace(self, **changes)

    def map(self, change):
        """The call with change(tensor) of each tensor."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return self.replace(**{k: change(v) for k, v in values.items() if isinstance(v, torch.Tensor)})
