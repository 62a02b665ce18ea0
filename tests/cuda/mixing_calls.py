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


def mixup_bwd(library, grad, x, lam, permutation, *, x_needs_grad=True, grad_x=None, parts=0, **options):
    """grad_x or None, grad_lam or None where x is, launches."""
    if x_needs_grad and grad_x is None:
        grad_x = torch.full_like(grad, torch.nan)
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


class MixupNormalizeArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32), ("parts", ctypes.c_int32),
        *[(name, ctypes.c_int64) for name in ("B", "F", "C", "channel_stride")],
        ("x", ctypes.c_void_p), ("x_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p), ("out_stride", ctypes.c_int64),
        ("lam", ctypes.c_void_p), ("lam_stride", ctypes.c_int64),
        ("permutation", ctypes.c_void_p), ("permutation_stride", ctypes.c_int64),
        ("mean", ctypes.c_void_p), ("std", ctypes.c_void_p),
        ("mean_stride", ctypes.c_int64), ("std_stride", ctypes.c_int64),
        ("workspace", ctypes.c_void_p),
    ]  # fmt: skip


def mixup_normalize(library, x, lam, permutation, mean, std, dtype, *, out=None, parts=0, **options):
    """x (B, C, H, W) uint8, dense samples; returns (result in the layout of x, launches)."""
    out = torch.full_like(x, torch.nan, dtype=dtype) if out is None else out
    args = MixupNormalizeArgs(
        dtype=DTYPE_CODES[dtype], parts=parts, B=len(x), F=x[0].numel(), C=x.shape[1], channel_stride=x.stride(1),
        x=x.data_ptr(), x_stride=x.stride(0), out=out.data_ptr(), out_stride=out.stride(0),
        lam=lam.data_ptr(), lam_stride=lam.stride(0),
        permutation=permutation.data_ptr(), permutation_stride=permutation.stride(0),
        mean=mean.data_ptr(), std=std.data_ptr(), mean_stride=mean.stride(0), std_stride=std.stride(0),
    )  # fmt: skip
    reads = {"x": x, "lam": lam, "permutation": permutation, "mean": mean, "std": std}
    return out, run(library, "mixup_normalize", args, args, reads, {"out": out}, options)


class MixupCrossEntropyArgs(ctypes.Structure):
    _fields_ = [
        ("dtype", ctypes.c_int32), ("warps_per_row", ctypes.c_int32), ("N", ctypes.c_int64), ("C", ctypes.c_int64),
        ("label_smoothing", ctypes.c_double), ("logits", ctypes.c_void_p), ("row_stride", ctypes.c_int64),
        ("target", ctypes.c_void_p), ("partner", ctypes.c_void_p), ("partner_stride", ctypes.c_int64),
        ("lam", ctypes.c_void_p), ("lam_stride", ctypes.c_int64), ("weight", ctypes.c_void_p),
        ("weight_sum", ctypes.c_void_p), ("ignore_index", ctypes.c_int64), ("partner_is_class", ctypes.c_int32),
    ]  # fmt: skip


class MixupCrossEntropyFwdArgs(ctypes.Structure):
    _fields_ = [
        ("common", MixupCrossEntropyArgs),
        *[(name, ctypes.c_void_p) for name in ("loss", "lse", "counted")],
    ]


class MixupCrossEntropyBwdArgs(ctypes.Structure):
    _fields_ = [
        ("common", MixupCrossEntropyArgs), ("grad_loss", ctypes.c_void_p), ("grad_loss_stride", ctypes.c_int64),
        ("lse", ctypes.c_void_p), ("grad_logits", ctypes.c_void_p),
    ]  # fmt: skip


def _cross_entropy_args(logits, target, partner, lam, label_smoothing, weight, ignore_index, by_class, warps):
    """The arguments, and the tensors that they point to."""
    reads = {"logits": logits, "target": target, "partner": partner, "lam": lam}
    if weight is not None:
        reads |= {"weight": weight, "weight_sum": weight.sum(dtype=torch.float64)}
    pointers = {name: tensor.data_ptr() for name, tensor in reads.items()}
    args = MixupCrossEntropyArgs(
        dtype=DTYPE_CODES[logits.dtype], warps_per_row=warps, N=len(logits), C=logits.shape[1],
        label_smoothing=label_smoothing, row_stride=logits.stride(0), partner_stride=partner.stride(0),
        lam_stride=lam.stride(0), ignore_index=ignore_index, partner_is_class=by_class, **pointers,
    )  # fmt: skip
    return args, reads


def mixup_cross_entropy_fwd(
    library, logits, target, partner, lam, label_smoothing=0.0, *, weight=None, ignore_index=-100,
    partner_is_class=False, warps_per_row=0, **options,
):  # fmt: skip
    """loss, lse, the rows' weights in the mean, and the launches."""
    results = torch.full((3, len(logits)), torch.nan, dtype=torch.float64, device=logits.device).unbind()
    common, reads = _cross_entropy_args(
        logits, target, partner, lam, label_smoothing, weight, ignore_index, partner_is_class, warps_per_row
    )
    args = MixupCrossEntropyFwdArgs(common, *(result.data_ptr() for result in results))
    writes = dict(zip(("loss", "lse", "counted"), results, strict=True))
    launches = library.call(
        "mixup_cross_entropy_fwd", ctypes.byref(args), STREAM,
        buffers={**reads, **writes}, read_only=set(reads), **options,
    )  # fmt: skip
    return *results, launches


def mixup_cross_entropy_bwd(
    library, grad_loss, logits, target, partner, lam, lse, label_smoothing=0.0, *, weight=None, ignore_index=-100,
    partner_is_class=False, grad_logits=None, warps_per_row=0, **options,
):  # fmt: skip
    """The gradient by the logits and the launches."""
    if grad_logits is None:
        grad_logits = torch.full(logits.shape, torch.nan, dtype=logits.dtype, device=logits.device)
    common, reads = _cross_entropy_args(
        logits, target, partner, lam, label_smoothing, weight, ignore_index, partner_is_class, warps_per_row
    )
    args = MixupCrossEntropyBwdArgs(
        common, grad_loss.data_ptr(), grad_loss.stride(0), lse.data_ptr(), grad_logits.data_ptr()
    )
    reads |= {"grad_loss": grad_loss, "lse": lse}
    launches = library.call(
        "mixup_cross_entropy_bwd", ctypes.byref(args), STREAM,
        buffers={**reads, "grad_logits": grad_logits}, read_only=set(reads), **options,
    )  # fmt: skip
    return grad_logits, launches
