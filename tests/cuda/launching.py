"""What the calls of all CUDA launchers share: dtype codes, poisoned memory, the workspace."""

import ctypes

import torch

from tests.gpu_emulation import STREAM

DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


def accumulation_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def poisoned_on(device):
    def poisoned(shape, dtype):
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    return poisoned


def address(tensor):
    return None if tensor is None else tensor.data_ptr()


def strides(tensor):
    return (ctypes.c_int64 * 2)(*tensor.stride())


def launch(library, function, args, reads, writes, **options):
    """Calls `function(&args, stream)` with a poisoned workspace as its own `_workspace` asks for.

    Args:
        args: A structure whose addresses are set but for `common.workspace`.
        reads, writes: Tensors or None by name, that kernels may read, or read and write.
        options: Of `library.call`.

    Returns:
        The launches.
    """
    size = ctypes.c_size_t()
    library.call(f"{function}_workspace", ctypes.byref(args), ctypes.byref(size))
    reads = {name: tensor for name, tensor in reads.items() if tensor is not None}
    writes = {name: tensor for name, tensor in writes.items() if tensor is not None}
    device = next(iter(reads.values())).device
    workspace = torch.full((max(size.value, 1),), 0xFF, dtype=torch.uint8, device=device)
    args.common.workspace = workspace.data_ptr()
    buffers = {**reads, **writes, "workspace": workspace}
    return library.call(
        function, ctypes.byref(args), STREAM, buffers=buffers, read_only=set(reads), **options
    )
