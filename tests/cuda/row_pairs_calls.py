"""The launchers of csrc/cuda/row_pairs.h as the operators `row_pairs_fwd` and `row_pairs_bwd`."""

import ctypes

import torch

from tests.cuda.launching import DTYPE_CODES, accumulation_dtype, address, poisoned_on, strides
from tests.gpu_emulation import STREAM


class Operands(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("dtype", "pairs", "normalize", "distance")],
        *[(name, ctypes.c_int64) for name in ("N", "D")],
        ("operands", ctypes.c_void_p * 3),
        *[(name, ctypes.c_int64 * 3) for name in ("row_strides", "column_strides")],
    ]


class FwdArgs(ctypes.Structure):
    _fields_ = [("common", Operands), ("values", ctypes.c_void_p), ("saved", ctypes.c_void_p)]


class BwdArgs(ctypes.Structure):
    _fields_ = [
        ("common", Operands),
        ("grad_values", ctypes.c_void_p),
        ("saved", ctypes.c_void_p),
        ("grads", ctypes.c_void_p * 3),
    ]


def row_pairs_fwd(library, x, y, z, normalize, measure, **options):
    """(values, saved), launches."""
    poisoned = poisoned_on(x.device)
    common, reads = _operands(x, y, z, normalize, measure)
    values = poisoned((len(x),), torch.float64)
    saved = poisoned((len(x), common.pairs, 4), accumulation_dtype(x.dtype))
    args = FwdArgs(common, address(values), address(saved))
    return (values, saved), _launch(library, "row_pairs_fwd", args, reads, [values, saved], options)


def row_pairs_bwd(library, grad_values, x, y, z, saved, normalize, measure, *needs_grad, **options):
    """(grad_x, grad_y, grad_z), None where none is needed, and the launches."""
    poisoned = poisoned_on(x.device)
    common, reads = _operands(x, y, z, normalize, measure)
    grads = [poisoned(x.shape, x.dtype) if need else None for need in needs_grad]
    addresses = (ctypes.c_void_p * 3)(*(address(grad) for grad in grads))
    args = BwdArgs(common, address(grad_values), address(saved), addresses)
    return grads, _launch(library, "row_pairs_bwd", args, [*reads, grad_values, saved], grads, options)


def _operands(x, y, z, normalize, measure):
    operands = [rows for rows in (x, y, z) if rows is not None]
    every = list(zip(*(strides(rows) for rows in operands), strict=True))
    common = Operands(
        dtype=DTYPE_CODES[x.dtype],
        pairs=len(operands) - 1,
        normalize=normalize,
        distance=measure == "distance",
        N=x.shape[0],
        D=x.shape[1],
        operands=(ctypes.c_void_p * 3)(*(address(rows) for rows in operands)),
        row_strides=(ctypes.c_int64 * 3)(*every[0]),
        column_strides=(ctypes.c_int64 * 3)(*every[1]),
    )
    return common, operands


def _launch(library, function, args, reads, writes, options):
    reads = {f"read {k}": tensor for k, tensor in enumerate(reads)}
    writes = {f"written {k}": tensor for k, tensor in enumerate(writes) if tensor is not None}
    buffers = {**reads, **writes}
    return library.call(
        function, ctypes.byref(args), STREAM, buffers=buffers, read_only=set(reads), **options
    )
