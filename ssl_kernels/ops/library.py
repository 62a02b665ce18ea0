"""The operator library `torch.ops.ssl_kernels`. Backends are overloads: `contrastive_fwd.native`, `.chunked`, ..."""

from functools import partial

import torch

OVERLOADS = ("native", "triton", "chunked")

library = torch.library.Library("ssl_kernels", "DEF")  # lives as long as the process


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
