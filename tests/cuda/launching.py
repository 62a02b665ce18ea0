"""What the calls of all CUDA launchers share: dtype codes, poisoned memory, the workspace, a product of matrices."""

import ctypes
import traceback

import torch

from tests.gpu_emulation import STREAM

DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


class MatrixProduct(ctypes.Structure):
    """Of csrc/cuda/matrix_product.h."""

    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("dtype", "transposed", "add")],
        *[(name, ctypes.c_int64) for name in ("M", "N", "K", "a_stride", "b_stride", "result_stride")],
        *[(name, ctypes.c_void_p) for name in ("a", "b", "result")],
    ]


MultiplyMatrices = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(MatrixProduct), ctypes.c_void_p)


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


def multiplying(device, stream):
    """The library of `MultiplyMatrices`, by torch, which is to be called with this stream, or with any for None."""

    def multiply(pointer, handle):
        product = pointer.contents
        dtype = next(dtype for dtype, code in DTYPE_CODES.items() if code == product.dtype)
        acc = accumulation_dtype(dtype)
        m, n, k = product.M, product.N, product.K
        try:
            if stream is not None and (handle or 0) != stream:
                raise ValueError(f"the product is on stream {handle}, not {stream}")
            a_shape = (k, m) if product.transposed else (m, k)
            a = _matrix(product.a, a_shape, product.a_stride, dtype, device)
            b = _matrix(product.b, (k, n), product.b_stride, dtype, device)
            result = _matrix(product.result, (m, n), product.result_stride, acc, device)
            made = (a.T if product.transposed else a).to(acc) @ b.to(acc)
            result.copy_(result + made if product.add else made)
        except Exception:  # nothing may leave a function that C calls
            traceback.print_exc()
            return 999
        return 0

    return MultiplyMatrices(multiply)


def _matrix(address, shape, stride, dtype, device):
    """The memory at an address as a tensor with unit column stride."""
    length = (shape[0] - 1) * stride + shape[1]
    if device.type == "cpu":
        memory = (ctypes.c_char * (length * dtype.itemsize)).from_address(address)
        flat = torch.frombuffer(memory, dtype=dtype)
    else:
        interface = {
            "shape": (length,),
            "typestr": f"<i{dtype.itemsize}",
            "data": (address, False),
            "version": 3,
        }
        holder = type("Memory", (), {"__cuda_array_interface__": interface})()
        flat = torch.as_tensor(holder, device=device).view(dtype)
    return flat.as_strided(shape, (stride, 1))


def launch(library, function, args, reads, writes, *, multiply=multiplying, **options):
    """Calls `function(&args, stream)` with a poisoned workspace as its own `_workspace` asks for.

    Args:
        args: A structure whose addresses are set but for `common.workspace`.
        reads, writes: Tensors or None by name, that kernels may read, or read and write.
        multiply: multiply(device, stream) makes the library of matrix products, or None for a launcher without.
        options: Of `library.call`.

    Returns:
        The launches.
    """
    tensors = [tensor for tensor in (*reads.values(), *writes.values()) if tensor is not None]
    if hasattr(args.common, "multiply"):
        device = tensors[0].device
        function_pointer = multiply and multiply(
            device, options.get("stream", 0) if device.type == "cpu" else None
        )
        args.common.multiply = ctypes.cast(function_pointer, ctypes.c_void_p)
    size = ctypes.c_size_t()
    library.call(f"{function}_workspace", ctypes.byref(args), ctypes.byref(size))
    reads = {name: tensor for name, tensor in reads.items() if tensor is not None}
    writes = {name: tensor for name, tensor in writes.items() if tensor is not None}
    workspace = torch.full((max(size.value, 1),), 0xFF, dtype=torch.uint8, device=tensors[0].device)
    args.common.workspace = workspace.data_ptr()
    buffers = {**reads, **writes, "workspace": workspace}
    return library.call(
        function, ctypes.byref(args), STREAM, buffers=buffers, read_only=set(reads), **options
    )
