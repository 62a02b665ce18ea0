"""Calls the mixing launchers of csrc/cuda on tensors, with poisoned results and scratch memory."""

import ctypes
import functools
from pathlib import Path

import torch

from tests.gpu_emulation import STREAM, Counters

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
DTYPE_CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


@functools.cache
def library_of(gpu, operation):
    """The launchers of csrc/cuda/<operation>.h."""
    return gpu.cuda_library([SOURCES / f"{operation}.cu"])


def counted(launches, name):
    """Counters of the launches of one kernel, added up."""
    return sum((launch.counters for launch in launches if name in launch.kernel), start=Counters())


def aligned(x):
    """A copy of a contiguous CPU tensor that begins at a multiple of 256 bytes, as on a card."""
    memory = torch.zeros(x.nbytes + 256, dtype=torch.uint8)
    start = -memory.data_ptr() % 256
    return memory[start : start + x.nbytes].view(x.dtype).view(x.shape).copy_(x)


class MixupArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32), ("parts", ctypes.c_int32), ("B", ctypes.c_int64), ("F", ctypes.c_int64),
        ("x", ctypes.c_void_p), ("x_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p), ("out_stride", ctypes.c_int64),
        ("lam", ctypes.c_void_p), ("lam_stride", ctypes.c_int64),
        ("permutation", ctypes.c_void_p), ("permutation_stride", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
    ]  # fmt: skip


class MixupBwdArgs(ctypes.Structure):
    _fields_ = [
        ("common", MixupArgs), ("x", ctypes.c_void_p), ("x_stride", ctypes.c_int64), ("grad_lam", ctypes.c_void_p),
    ]  # fmt: skip


def run(library, function, args, holder, reads, writes, options):
    """Asks for the workspace, poisons it, launches. `holder` is the structure with its address."""
    size = ctypes.c_size_t()
    library.call(f"{function}_workspace", ctypes.byref(args), ctypes.byref(size))
    device = next(iter(writes.values())).device
    workspace = torch.full((max(size.value, 1),), 0xFF, dtype=torch.uint8, device=device)
    holder.workspace = workspace.data_ptr()
    return library.call(
        function, ctypes.byref(args), STREAM,
        buffers={**reads, **writes, "workspace": workspace}, read_only=set(reads), **options,
    )  # fmt: skip


def _mixup_args(x, out, lam, permutation, parts):
    return MixupArgs(
        dtype=DTYPE_CODES[x.dtype], parts=parts, B=len(x), F=x[0].numel(),
        x=x.data_ptr(), x_stride=x.stride(0),
        out=None if out is None else out.data_ptr(), out_stride=0 if out is None else out.stride(0),
        lam=lam.data_ptr(), lam_stride=lam.stride(0),
        permutation=permutation.data_ptr(), permutation_stride=permutation.stride(0),
    )  # fmt: skip


def mixup(library, x, lam, permutation, out=None, *, parts=0, **options):
    """Mixes x (B, ...), dense samples, into `out`, or in place where that is x; returns (out, launches)."""
    out = torch.full_like(x, torch.nan) if out is None else out
    args = _mixup_args(x, out, lam, permutation, parts)
    reads = {"lam": lam, "permutation": permutation} | ({} if out is x else {"x": x})
    return out, run(library, "mixup_fwd", args, args, reads, {"out": out}, options)


def mixup_bwd(library, grad, x, lam, permutation, *, x_needs_grad=True, parts=0, **options):
    """grad_x or None, grad_lam or None where x is, launches."""
    grad_x = torch.full_like(grad, torch.nan) if x_needs_grad else None
    grad_lam = None if x is None else torch.full((len(grad),), torch.nan, dtype=lam.dtype, device=lam.device)
    args = MixupBwdArgs(
        common=_mixup_args(grad, grad_x, lam, permutation, parts),
        x=None if x is None else x.data_ptr(),
        x_stride=0 if x is None else x.stride(0),
        grad_lam=None if grad_lam is None else grad_lam.data_ptr(),
    )
    reads = {"grad": grad, "lam": lam, "permutation": permutation} | ({} if x is None else {"x": x})
    writes = {"grad_x": grad_x, "grad_lam": grad_lam}
    writes = {name: tensor for name, tensor in writes.items() if tensor is not None}
    launches = run(library, "mixup_bwd", args, args.common, reads, writes, options)
    return grad_x, grad_lam, launches


class CutmixArgs(ctypes.Structure):
    _fields_ = [
        ("element_bytes", ctypes.c_int32), ("dtype", ctypes.c_int32),
        *[(name, ctypes.c_int64) for name in ("B", "F", "H", "W", "row_stride", "column_stride")],
        ("x", ctypes.c_void_p), ("x_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p), ("out_stride", ctypes.c_int64),
        ("boxes", ctypes.c_void_p), ("box_strides", ctypes.c_int64 * 2),
        ("permutation", ctypes.c_void_p), ("permutation_stride", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
    ]  # fmt: skip


def cutmix(library, x, boxes, permutation, out=None, *, function="cutmix_fwd", **options):
    """x (B, ..., H, W), dense samples, into `out`, or in place where that is x; returns (out, launches)."""
    out = torch.full_like(x, 77) if out is None else out
    args = CutmixArgs(
        element_bytes=x.itemsize, dtype=DTYPE_CODES.get(x.dtype, -1), B=len(x), F=x[0].numel(),
        H=x.shape[-2], W=x.shape[-1], row_stride=x.stride(-2), column_stride=x.stride(-1),
        x=x.data_ptr(), x_stride=x.stride(0), out=out.data_ptr(), out_stride=out.stride(0),
        boxes=boxes.data_ptr(), box_strides=(ctypes.c_int64 * 2)(*boxes.stride()),
        permutation=permutation.data_ptr(), permutation_stride=permutation.stride(0),
    )  # fmt: skip
    reads = {"boxes": boxes, "permutation": permutation} | ({} if out is x else {"x": x})
    return out, run(library, function, args, args, reads, {"out": out}, options)


def cutmix_bwd(library, grad, boxes, permutation, **options):
    """The gradient by x and the launches."""
    return cutmix(library, grad, boxes, permutation, function="cutmix_bwd", **options)
