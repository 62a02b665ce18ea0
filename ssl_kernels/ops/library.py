"""The operator library `torch.ops.ssl_kernels`. Backends are overloads: `contrastive_fwd.native`, `.chunked`, ..."""

from functools import partial

import torch

OVERLOADS = ("native", "triton", "chunked")

library = torch.library.Library("ssl_kernels", "DEF")  # lives as long as the process


def define(name, signature, fake):
    """Define one operator with an overload a backend, all of one signature; `fake` gets the overload's name first."""
    for overload in OVERLOADS:
        library.define(f"{name}.{overload}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"ssl_kernels::{name}.{overload}", partial(fake, overload), lib=library)
    return {overload: getattr(getattr(torch.ops.ssl_kernels, name), overload) for overload in OVERLOADS}


def accumulation_dtype(tensor):
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
