"""Modules inside wrappers for compilation, checkpointing or data parallelism, by the names that they have without."""

import torch
from torch import nn

# Where torch.compile, activation checkpointing and FSDP keep the module that they wrap.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrapped(module):
    """The module inside a compiled or data-parallel one."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(module, wrappers) or hasattr(module, "_orig_mod"):
        module = module.module if isinstance(module, wrappers) else module._orig_mod
    return module


def parts_of(module):
    """{path: (prefix, part)} of the module and all within it, paths as if nothing were wrapped, prefixes as it is."""
    parts = {}
    _add_parts(parts, set(), "", "", module)
    return parts


def _add_parts(parts, seen, path, prefix, part):
    while len(part._modules) == 1:
        ((name, child),) = part._modules.items()
        plain = name == "module" and not part._parameters and not part._buffers
        if child is None or not (plain or name in WRAPPED):
            break
        prefix, part = f"{prefix}{name}.", child
    if part in seen:
        return
    seen.add(part)
    parts[path] = prefix, part
    for name, child in part._modules.items():
        if child is not None:
            _add_parts(parts, seen, f"{path}.{name}" if path else name, f"{prefix}{name}.", child)


def tensors_of(module):
    """({name: parameter}, {name: buffer}), each tensor once and named as if nothing were wrapped."""
    parameters, buffers, seen = {}, {}, set()
    is_compiling = torch.compiler.is_compiling()
    for path, (_, part) in parts_of(module).items():
        prefix = f"{path}." if path else ""
        for found, tensors in ((parameters, part._parameters), (buffers, part._buffers)):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                key = tensor if is_compiling else id(tensor)  # the hash of a tensor is a call in Python
                if key not in seen:
                    seen.add(key)
                    found[prefix + name] = tensor
    return parameters, buffers
