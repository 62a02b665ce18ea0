"""The operator library `torch.ops.ssl_kernels`. Backends are overloads: `contrastive_fwd.native`, `.chunked`, ..."""

import functools
import importlib
import importlib.util
from functools import partial

import torch

from ssl_kernels import backends

OVERLOADS = ("native", "triton", "chunked")

library = torch.library.Library("ssl_kernels", "DEF")  # lives as long as the process
in_triton = {}  # from the name of an operator to what runs its `triton` overload


def define(name, signature, fake):
    """Define one operator with an overload a backend, all of one signature; `fake` gets the overload's name first.

    An operator that works in place declares what it mutates, `Tensor(a!) x`, and returns nothing; its calls advance the
    version counter of those tensors, so that autograd notices an overwritten tensor that it still needs.
    """
    for overload in OVERLOADS:
        qualified = f"{name}.{overload}"
        library.define(f"{qualified}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"ssl_kernels::{qualified}", partial(fake, overload), lib=library)
    overloads = {overload: getattr(getattr(torch.ops.ssl_kernels, name), overload) for overload in OVERLOADS}
    for qualified, op in ((f"{name}.{overload}", op) for overload, op in overloads.items()):
        if op._schema.is_mutable:
            library.impl(qualified, partial(_advance_versions, op), "ADInplaceOrView", with_keyset=True)
    return overloads


def _advance_versions(op, keyset, *args):
    """Kernel of an in-place operator between autograd and the backends; `Library.define` alone has none."""
    op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
    for argument, value in zip(op._schema.arguments, args, strict=True):
        if argument.alias_info is not None and argument.alias_info.is_write:
            torch.autograd.graph.increment_version(value)


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


def where_it_runs(name, triton_module):
    """`unsupported(backend, *tensors)` of an operation whose kernels take every call on a device that has them.

    Args:
        name: An operator whose `native` overload has a kernel on CPU or CUDA where it was compiled.
        triton_module: Its Triton kernels, "ssl_kernels.triton.<op>", with an `unsupported(*tensors)` of its own.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    native = {key.lower() for key in ("CPU", "CUDA") if has_kernel(f"ssl_kernels::{name}.native", key)}
    has_triton = importlib.util.find_spec(triton_module) is not None

    def unsupported(backend, *tensors):
        device = tensors[0].device.type
        if backend in ("chunked", "reference"):
            return None
        if backend == "native":
            if backends.extension is None:
                return backends.extension_missing
            if device in native:
                return backends.native_unsupported(tensors[0].device) if device == "cuda" else None
            if device in ("cpu", "cuda"):
                return f"the extension was built without its kernel for {device}"
            return f"it runs on cpu and cuda, not on {device}"
        if device != "cuda":
            return f"it runs on cuda, not on {device}"
        if not has_triton:
            return "it has no Triton kernel"
        return backends.triton_unsupported(tensors[0].device) or importlib.import_module(
            triton_module
        ).unsupported(*tensors)

    return unsupported


def implement_in_triton(names, triton_module):
    """Register functions of `triton_module` as the `triton` overloads of the operators of their names, on CUDA.

    Triton launches on the current device, so each runs with the device of its tensors as the current one.
    """
    for name in names:

        def run(*args, name=name):
            with torch.cuda.device_of(_first_tensor(args)):
                return _triton_function(triton_module, name)(*args)

        library.impl(f"{name}.triton", run, "CUDA")
        in_triton[name] = run


@functools.cache
def _triton_function(triton_module, name):
    importlib.import_module("ssl_kernels.triton.loading")
    return getattr(importlib.import_module(triton_module), name)


def _first_tensor(args):
    for argument in args:
        if isinstance(argument, torch.Tensor):
            return argument
        if isinstance(argument, list) and argument:
            return argument[0]
