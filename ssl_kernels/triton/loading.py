"""The first launch of a Triton kernel loads it, which a CUDA graph cannot capture: that is said before it is tried."""

import sys

import torch
from triton import knobs


def refuse_in_capture(module, function, name, metadata_group, hash):
    """Triton's hook before a kernel is loaded; of kernels other than ours it knows nothing."""
    ours = any(
        path.startswith("ssl_kernels.triton.") and hasattr(loaded, name)
        for path, loaded in list(sys.modules.items())
    )
    if ours and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"ssl_kernels: the Triton kernel {name} must be loaded before a CUDA graph is captured:"
            " run the step once, with the same shapes, before capturing it (docs/gpu.md)"
        )


knobs.runtime.kernel_load_start_hook.add(refuse_in_capture)
