"""Calls csrc/cuda/sigmoid_pairs.h on tensors, and holds the results to float64."""

import ctypes
from typing import NamedTuple

import torch

from tests.cuda.launching import DTYPE_CODES, accumulation_dtype, address, launch, poisoned_on, strides
from tests.support.sigmoid_pairs import NAMES, check_results


class Common(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in (
            "dtype", "normalize_rows", "normalize_columns", "allow_tf32", "splits", "equal_ids_are_positive",
        )],
        *[(name, ctypes.c_int64) for name in ("block_rows", "block_columns", "N", "M", "D", "diagonal")],
        ("row_strides", ctypes.c_int64 * 2),
        ("column_strides", ctypes.c_int64 * 2),
        *[(name, ctypes.c_void_p) for name in (
            "rows", "columns", "scale", "bias", "row_ids", "column_ids", "multiply", "workspace",
        )],
    ]  # fmt: skip


GRADIENTS = ("grad_rows", "grad_columns", "grad_scale", "grad_bias")


class FwdArgs(ctypes.Structure):
    _fields_ = [
        ("common", Common),
        ("losses", ctypes.c_void_p),
        ("total", ctypes.c_int32),
        ("keep", ctypes.c_int32),
        *[(name, ctypes.c_void_p) for name in GRADIENTS],
    ]


class BwdArgs(ctypes.Structure):
    _fields_ = [("common", Common), *[(name, ctypes.c_void_p) for name in ("grad_losses", *GRADIENTS)]]


class Gradients(NamedTuple):
    rows: torch.Tensor | None
    columns: torch.Tensor | None
    scale: torch.Tensor
    bias: torch.Tensor


def losses(library, call, *, total=False, splits=0, tf32=False, **options):
    """The forward without gradients; (losses, launches)."""
    poisoned = poisoned_on(call.rows.device)
    result = poisoned(() if total else (len(call.rows),), torch.float64)
    args = FwdArgs(_common(call, splits, tf32), result.data_ptr(), total, 0)
    return result, launch(library, "sigmoid_pairs_fwd", args, _reads(call), {"losses": result}, **options)


def total_with_gradients(
    library, call, *, needed=(True, True), splits=0, blocks=(0, 0), tf32=False, **options
):
    """The forward that keeps the gradients of the sum; (total, Gradients in acc_t, launches)."""
    poisoned = poisoned_on(call.rows.device)
    total = poisoned((), torch.float64)
    grads = _poisoned_gradients(call, accumulation_dtype(call.rows.dtype), needed)
    args = FwdArgs(_common(call, splits, tf32, blocks), total.data_ptr(), 1, 1, *map(address, grads))
    writes = {"losses": total, **grads._asdict()}
    writes = {f"grad_{name}" if name in Gradients._fields else name: t for name, t in writes.items()}
    launches = launch(library, "sigmoid_pairs_fwd", args, _reads(call), writes, **options)
    return total, grads, launches


def weighted_gradients(
    library, call, grad_losses, *, needed=(True, True), splits=0, blocks=(0, 0), tf32=False, **options
):
    """The backward; (Gradients, launches)."""
    grads = _poisoned_gradients(call, call.rows.dtype, needed)
    args = BwdArgs(_common(call, splits, tf32, blocks), grad_losses.data_ptr(), *map(address, grads))
    writes = {f"grad_{name}": tensor for name, tensor in grads._asdict().items()}
    reads = {**_reads(call), "grad_losses": grad_losses}
    return grads, launch(library, "sigmoid_pairs_bwd", args, reads, writes, **options)


def check_parity(library, call, *, blocks=(0, 0), tf32=False, **options):
    """Holds losses, their sum, its gradients and weighted ones to float64; returns all launches.

    `blocks`: rows and columns of a block of coefficients of wide rows.
    """
    options["tf32"] = tf32
    by_row, all_launches = losses(library, call, **options)
    grads, launches = weighted_gradients(library, call, call.cotangent, blocks=blocks, **options)
    all_launches += launches
    roundings = {"rounds_coefficients": True, "tf32": tf32}
    check_results(_named(by_row, grads), call, "cuda", **roundings)
    whole = call.replace(total=True)
    alone, launches = losses(library, whole, total=True, **options)
    all_launches += launches
    total, grads, launches = total_with_gradients(library, whole, blocks=blocks, **options)
    grads = [(grad * whole.cotangent).to(grad.dtype) for grad in grads]  # kept in acc_t
    grads = [*(grad.to(call.rows.dtype) for grad in grads[:2]), *grads[2:]]
    for each in (alone, total):
        check_results(_named(each, grads), whole, "cuda", **roundings)
    return all_launches + launches


def _named(losses, grads):
    return dict(zip(NAMES, (losses, *grads), strict=True))


def _common(call, splits, tf32, blocks=(0, 0)):
    return Common(
        dtype=DTYPE_CODES[call.rows.dtype],
        normalize_rows=call.normalize_rows,
        normalize_columns=call.normalize_columns,
        allow_tf32=tf32,
        splits=splits,
        block_rows=blocks[0],
        block_columns=blocks[1],
        N=len(call.rows),
        M=len(call.columns),
        D=call.rows.shape[1],
        diagonal=call.diagonal,
        equal_ids_are_positive=call.equal_ids_are_positive,
        row_strides=strides(call.rows),
        column_strides=strides(call.columns),
        **{name: address(tensor) for name, tensor in _reads(call).items()},
    )


def _reads(call):
    names = ("rows", "columns", "scale", "bias", "row_ids", "column_ids")
    return {name: getattr(call, name) for name in names}


def _poisoned_gradients(call, dtype, needed):
    poisoned, acc = poisoned_on(call.rows.device), accumulation_dtype(call.rows.dtype)
    return Gradients(
        poisoned(call.rows.shape, dtype) if needed[0] else None,
        poisoned(call.columns.shape, dtype) if needed[1] else None,
        poisoned((), acc),
        poisoned((), acc),
    )
