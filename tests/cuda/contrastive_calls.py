"""Calls csrc/cuda/contrastive.h on tensors, with poisoned results and scratch memory, and holds it to float64."""

import ctypes
from typing import NamedTuple

import torch

from tests.cuda.launching import DTYPE_CODES, accumulation_dtype, address, launch, poisoned_on
from tests.support.contrastive import check_results


class Additions(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("column_bias", "row_bias", "row_limit", "exempt")],
        ("only_equal_ids", ctypes.c_int32),
    ]


class Common(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in (
            "dtype", "normalize_rows", "normalize_columns", "keep_diagonal", "both_directions", "allow_tf32",
            "splits", "column_dtype",
        )],
        *[(name, ctypes.c_int64) for name in ("block_rows", "block_columns", "N", "M", "D", "P")],
        ("row_strides", ctypes.c_int64 * 2),
        ("column_strides", ctypes.c_int64 * 2),
        *[(name, ctypes.c_void_p) for name in (
            "rows", "columns", "scale", "positives", "row_ids", "column_ids", "multiply", "workspace",
        )],
        ("additions", Additions),
    ]  # fmt: skip


class FwdArgs(ctypes.Structure):
    _fields_ = [
        ("common", Common),
        *[(name, ctypes.c_void_p) for name in (
            "lse", "column_lse", "positive_logits", "row_rnorm", "column_rnorm", "expectation",
        )],
    ]  # fmt: skip


class BwdArgs(ctypes.Structure):
    _fields_ = [
        ("common", Common),
        *[(name, ctypes.c_void_p) for name in (
            "grad_lse", "grad_column_lse", "grad_positive_logits",
            "lse", "column_lse", "row_rnorm", "column_rnorm", "expectation",
            "grad_rows", "grad_columns", "grad_scale", "grad_column_bias", "grad_row_bias",
        )],
    ]  # fmt: skip


class Fwd(NamedTuple):
    lse: torch.Tensor
    column_lse: torch.Tensor | None
    positive_logits: torch.Tensor | None
    row_rnorm: torch.Tensor | None
    column_rnorm: torch.Tensor | None
    expectation: torch.Tensor | None


class Bwd(NamedTuple):
    grad_rows: torch.Tensor | None
    grad_columns: torch.Tensor | None
    grad_scale: torch.Tensor
    grad_column_bias: torch.Tensor | None = None
    grad_row_bias: torch.Tensor | None = None


def contrastive_fwd(library, call, *, expectation=False, splits=0, blocks=(0, 0), tf32=False, **options):
    """Runs the forward; returns (Fwd, launches). `blocks` are rows and columns of a block.

    `options` go to `library.call`.
    """
    n, m = call.sizes
    acc = accumulation_dtype(call.rows.dtype)
    poisoned = poisoned_on(call.rows.device)
    results = Fwd(
        lse=poisoned((n,), torch.float64),
        column_lse=poisoned((m,), torch.float64) if call.both_directions else None,
        positive_logits=None if call.positives is None else poisoned(call.positives.shape, torch.float64),
        row_rnorm=poisoned((n,), acc) if call.normalize_rows else None,
        column_rnorm=poisoned((m,), acc) if call.normalize_columns and not call.square else None,
        expectation=poisoned(call.rows.shape, acc) if expectation else None,
    )
    function = "contrastive_additions_fwd" if call.has_additions else "contrastive_fwd"
    flags = {"splits": splits, "block_rows": blocks[0], "block_columns": blocks[1], "allow_tf32": tf32}
    launches = _run(library, function, FwdArgs, call, results, {}, options, **flags)
    return results, launches


def contrastive_bwd(
    library, call, fwd, grad_lse, grad_column_lse=None, grad_positive_logits=None, *,
    rows_need_grad=True, columns_need_grad=True, biases_need_grad=True, splits=0, blocks=(0, 0), tf32=False, **options,
):  # fmt: skip
    """Runs the backward; returns (Bwd, launches)."""
    poisoned = poisoned_on(call.rows.device)
    with_columns = columns_need_grad and call.columns is not None and fwd.expectation is None
    results = Bwd(
        grad_rows=poisoned(call.rows.shape, call.rows.dtype) if rows_need_grad else None,
        grad_columns=poisoned(call.columns.shape, call.rows.dtype) if with_columns else None,
        grad_scale=poisoned((), accumulation_dtype(call.rows.dtype)),
        **{
            f"grad_{name}": poisoned(bias.shape, bias.dtype)
            for name, bias in (("column_bias", call.column_bias), ("row_bias", call.row_bias))
            if bias is not None and biases_need_grad and fwd.expectation is None
        },
    )
    inputs = {
        "grad_lse": grad_lse,
        "grad_column_lse": grad_column_lse,
        "grad_positive_logits": grad_positive_logits,
        "lse": fwd.lse,
        "column_lse": fwd.column_lse,
        "row_rnorm": fwd.row_rnorm,
        "column_rnorm": fwd.column_rnorm,
        "expectation": fwd.expectation,
    }
    flags = {"splits": splits, "block_rows": blocks[0], "block_columns": blocks[1], "allow_tf32": tf32}
    adds = call.has_additions and fwd.expectation is None
    function = "contrastive_additions_bwd" if adds else "contrastive_bwd"
    launches = _run(library, function, BwdArgs, call, results, inputs, options, **flags)
    return results, launches


def run(library, call, upstream, *, expectation=False, **options):
    """Fwd, Bwd and the launches of both; with `expectation` the backward is the one without a walk."""
    fwd, forward_launches = contrastive_fwd(library, call, expectation=expectation, **options)
    bwd, backward_launches = contrastive_bwd(library, call, fwd, *upstream, **options)
    return fwd, bwd, forward_launches + backward_launches


def check_parity(library, call, *, expectation=False, tf32=False, **options):
    """Holds forward and backward to float64; returns what `run` does."""
    fwd, bwd, launches = run(library, call, call.upstream(), expectation=expectation, tf32=tf32, **options)
    found = dict(zip(fwd._fields[:3], fwd[:3], strict=True)) | bwd._asdict()
    found = {name: tensor for name, tensor in found.items() if tensor is not None}
    check_results(found, call, "cuda", expectation=expectation, rounds_coefficients=True, tf32=tf32)
    return fwd, bwd, launches


def _run(library, function, args_type, call, results, inputs, options, **flags):
    n, m = call.sizes
    tensors = {name: getattr(call, name) for name in (
        "rows", "columns", "scale", "positives", "row_ids", "column_ids",
    )}  # fmt: skip
    added = {name: getattr(call, name) for name in ("column_bias", "row_bias", "row_limit", "exempt")}
    common = Common(
        dtype=DTYPE_CODES[call.rows.dtype],
        column_dtype=DTYPE_CODES[(call.rows if call.columns is None else call.columns).dtype],
        normalize_rows=call.normalize_rows,
        normalize_columns=call.normalize_columns,
        keep_diagonal=call.keep_diagonal,
        both_directions=call.both_directions,
        **flags,
        N=n,
        M=m,
        D=call.rows.shape[1],
        P=0 if call.positives is None else call.positives.numel() // n,
        row_strides=(ctypes.c_int64 * 2)(*call.rows.stride()),
        column_strides=(ctypes.c_int64 * 2)(*(call.rows if call.columns is None else call.columns).stride()),
        **{name: address(tensor) for name, tensor in tensors.items()},
        additions=Additions(
            only_equal_ids=call.only_equal_ids, **{name: address(tensor) for name, tensor in added.items()}
        ),
    )
    written = results._asdict()
    args = args_type(common=common, **{name: address(t) for name, t in {**inputs, **written}.items()})
    return launch(library, function, args, {**tensors, **added, **inputs}, written, **options)
