"""What the operations share: the operator library `torch.ops.ssl_kernels`, and tensors as autograd takes them."""

import torch

library = torch.library.Library("ssl_kernels", "DEF")  # lives as long as the process


def accumulation_dtype(tensor):
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def savable(tensor):
    """An inference tensor, which autograd refuses to save for backward, as a clone; else the tensor itself.

    A teacher's features are made under `torch.inference_mode()`; they need no gradient, but the pupil's need them.
    """
    if tensor is None or torch.compiler.is_compiling():  # Dynamo cannot ask a tensor
        return tensor
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def all_savable(*tensors):
    """Each of them `savable`."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return tensors
    return [tensor.clone() if tensor is not None and tensor.is_inference() else tensor for tensor in tensors]


def distinct(*operands):
    """Operands of a Function: torch.compile refuses one that is given a tensor twice, as ids of rows and columns."""
    if not torch.compiler.is_compiling():
        return operands
    made = []
    for operand in operands:
        again = operand is not None and any(operand is other for other in made)
        made.append(operand.view_as(operand) if again else operand)
    return made


def refuse_torch_func(op, backend):
    """Called before an autograd.Function without `setup_context`, which torch.func cannot differentiate."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f'{op}: backend "{backend}" cannot run inside torch.func; backend="reference" can'
        )
