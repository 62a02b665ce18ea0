"""Calls csrc/cuda/sigmoid_pairs.h on tensors, and the float64 truth by the definition."""

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tests.cuda.launching import DTYPE_CODES, accumulation_dtype, address, launch, poisoned_on, strides


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


class Call(NamedTuple):
    rows: torch.Tensor
    columns: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    diagonal: int = 0
    normalize_rows: bool = True
    normalize_columns: bool = True
    row_ids: torch.Tensor | None = None
    column_ids: torch.Tensor | None = None
    equal_ids_are_positive: bool = False


class Gradients(NamedTuple):
    rows: torch.Tensor | None
    columns: torch.Tensor | None
    scale: torch.Tensor
    bias: torch.Tensor


def random_call(n, m, d, dtype, *, scale=10.0, bias=-10.0, seed=0, device="cpu", ids=None, **flags):
    """`ids`: whether equal ones are "positive" or "left out", or None.

    A third of the rows and columns have one of three ids, the others one of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    acc = accumulation_dtype(dtype)
    rows, columns = (
        torch.randn(count, d, generator=generator, dtype=torch.float64).to(dtype).to(device)
        for count in (n, m)
    )
    scale, bias = (torch.tensor(value, dtype=acc, device=device) for value in (scale, bias))
    if ids is not None:
        for count, name in ((n, "row_ids"), (m, "column_ids")):
            own = torch.arange(count) + (10 if name == "row_ids" else 2**32)
            shared = torch.randint(3, (count,), generator=generator)
            flags[name] = torch.where(torch.arange(count) % 3 == 0, shared, own).to(device)
        flags["equal_ids_are_positive"] = ids == "positive"
    return Call(rows, columns, scale, bias, **flags)


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


def plain(call, grad_losses, dtype):
    """Losses (N,) and Gradients by the definition in `dtype`, as float64 on the CPU."""
    acc = accumulation_dtype(dtype)
    rows, columns = (x.cpu().to(dtype, copy=True).requires_grad_() for x in (call.rows, call.columns))
    scale, bias = (x.cpu().to(acc, copy=True).requires_grad_() for x in (call.scale, call.bias))
    x = F.normalize(rows, dim=1) if call.normalize_rows else rows
    y = F.normalize(columns, dim=1) if call.normalize_columns else columns
    z = scale * (x @ y.T).to(acc) + bias
    sign = torch.full_like(z, -1)
    torch.diagonal(sign, call.diagonal).fill_(1)
    if call.row_ids is not None:
        equal = (call.row_ids[:, None] == call.column_ids).cpu()
        if call.equal_ids_are_positive:
            sign = torch.where(equal, 1.0, -1.0).to(z.dtype)
        else:
            z = z.masked_fill(equal & (sign < 0), -torch.inf)
    by_row = -F.logsigmoid(sign * z).sum(1)
    (by_row.double() * grad_losses.cpu()).sum().backward()
    return by_row.detach().double(), Gradients(*(leaf.grad.double() for leaf in (rows, columns, scale, bias)))


def check_parity(library, call, *, tf32=False, splits=0, blocks=(0, 0), **options):
    """Holds losses, total, its gradients and weighted gradients to float64; returns all launches.

    About as accurate as plain PyTorch on the same values: the losses in acc_t whatever the dtype, the gradients in
    the dtype. Errors are measured in the size of what is added up. `blocks`: rows and columns of a block of
    coefficients of wide rows.
    """
    n, m = len(call.rows), len(call.columns)
    options = {"tf32": tf32, "splits": splits, **options}
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(n, generator=generator, dtype=torch.float64).to(call.rows.device) / n
    ones = torch.ones_like(weights)
    dtype, acc = call.rows.dtype, accumulation_dtype(call.rows.dtype)

    by_row, all_launches = losses(library, call, **options)
    truth, _ = plain(call, ones, torch.float64)
    near, _ = plain(call, ones, acc)
    scale = call.scale.double().abs().item()
    norms = [_norms(x, flag) for x, flag in (
        (call.rows, call.normalize_rows), (call.columns, call.normalize_columns),
    )]  # fmt: skip
    logit = scale * norms[0][1] * norms[1][1] + call.bias.double().abs().item() + 1
    unit = 2.0**-11 if tf32 else 2 * torch.finfo(acc).eps
    size = truth + m * 1e-4  # a sum of exponentials of z inherits the rounding of z, relative to itself
    _check(by_row, truth, near, size * logit, 4 * unit)
    total, launches = losses(library, call, total=True, **options)
    _check(total, truth.sum(), near.sum(), size.sum() * logit, 4 * unit)
    all_launches += launches

    unit = 2.0**-11 if tf32 else torch.finfo(dtype).eps
    unit = max(unit, torch.finfo(acc).eps * logit)
    for grad_losses, kept in ((ones, True), (weights, False)):
        _, exact = plain(call, grad_losses, torch.float64)
        _, other = plain(call, grad_losses, dtype)
        if kept:
            total, grads, launches = total_with_gradients(library, call, blocks=blocks, **options)
            _check(total, truth.sum(), near.sum(), size.sum() * logit, 4 * (2.0**-11 if tf32 else 2e-7))
        else:
            grads, launches = weighted_gradients(library, call, grad_losses, blocks=blocks, **options)
        all_launches += launches
        weight = grad_losses.max().item()
        own = [
            scale * weight * norms[1][1] * norms[0][0][:, None],
            scale * weight * norms[0][1] * norms[1][0][:, None],
        ]
        coefficients = (2 + truth.sum().item() / n) * weight
        for ours, right, theirs, factor in zip(grads[:2], exact[:2], other[:2], own, strict=True):
            _check(ours, right, theirs, factor * (2 + truth.sum().item() / n) + 1e-300, 4 * unit)
        _check(grads.scale, exact.scale, other.scale, coefficients * n * norms[0][1] * norms[1][1], 4 * unit)
        _check(grads.bias, exact.bias, other.bias, coefficients * n, 4 * unit)
    return all_launches


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


def _norms(x, normalize):
    """Factor of each row in its gradient, largest norm of a row as the products see it."""
    norm = x.double().cpu().norm(dim=1)
    if normalize:
        return 1 / norm.clamp_min(1e-12), 1.0
    return torch.ones_like(norm), norm.max().item()


def _check(ours, exact, other, size, floor):
    """Holds |ours - exact|, in units of size, to twice that of `other` plus a floor; inf and NaN must agree."""
    ours, exact, other = ours.cpu(), exact.to(ours.dtype), other.to(ours.dtype).double()
    assert ours.shape == exact.shape
    finite = torch.isfinite(exact)
    torch.testing.assert_close(ours[~finite], exact[~finite], equal_nan=True)
    ours, exact = ours.double(), exact.double()

    def error(values):
        return ((values - exact).abs() / size)[finite].max().item() if finite.any() else 0.0

    other_error = error(other) if torch.isfinite(other[finite]).all() else 0.0
    assert error(ours) <= 2 * other_error + floor
