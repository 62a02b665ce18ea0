"""`contrastive`: log-sum-exp of similarities over streamed tiles. docs/contrastive.md has the mathematics."""

import importlib
from functools import partial
from typing import NamedTuple

import torch

from ssl_kernels import backends, preference
from ssl_kernels.arguments import ContrastiveBackward, ContrastiveForward
from ssl_kernels.chunked import contrastive as chunked
from ssl_kernels.constants import KEPT_HEADER, holds_expectation
from ssl_kernels.ops.library import accumulation_dtype, savable
from ssl_kernels.ops.operation import OVERLOADS, Operation
from ssl_kernels.reference import contrastive as reference
from ssl_kernels.triton.tiles import keeps_expectation

_TRITON = "ssl_kernels.triton.contrastive"

_OPERANDS = (
    "Tensor rows, Tensor? columns, Tensor scale, Tensor? positives, Tensor? row_ids, Tensor? column_ids"
)
# Last, with defaults: most calls have none of them.
_ADDITIONS = (
    "Tensor? column_bias=None, Tensor? row_bias=None, Tensor? row_limit=None, Tensor? exempt=None,"
    " bool only_equal_ids=False"
)
_FLAGS = "bool normalize_rows, bool normalize_columns, bool keep_diagonal, bool both_directions"


def _fwd_fake(overload, *args, **options):
    call = ContrastiveForward(*args, **options)
    rows, columns = call.rows, call.columns
    n = rows.shape[0]
    m = n if columns is None else columns.shape[0]
    results = rows.new_empty
    acc = accumulation_dtype(rows)
    if call.wants_expectation and (overload in ("chunked", "native") or keeps_expectation(rows)):
        kept = rows.shape
    else:
        keeps_logits = call.keep and overload == "native" and rows.device.type == "cpu"
        kept = KEPT_HEADER if keeps_logits else 0
    return (
        results(n, dtype=torch.float64),
        results(m if call.both_directions else 0, dtype=torch.float64),
        results((0,) if call.positives is None else call.positives.shape, dtype=torch.float64),
        results(n if call.normalize_rows else 0, dtype=acc),
        results(m if call.normalize_columns and columns is not None else 0, dtype=acc),
        results(kept, dtype=acc),
    )


def _bwd_fake(*args, **options):
    call = ContrastiveBackward(*args, **options)
    rows, columns = call.rows, call.columns
    acc = accumulation_dtype(rows)
    return (
        rows.new_empty(rows.shape if call.rows_need_grad else (0,)),
        columns.new_empty(columns.shape)
        if columns is not None and call.columns_need_grad
        else rows.new_empty(0),
        rows.new_empty((), dtype=acc),
        rows.new_empty(call.column_bias.shape if call.column_bias_needs_grad else (0,), dtype=acc),
        rows.new_empty(call.row_bias.shape if call.row_bias_needs_grad else (0,), dtype=acc),
    )


def unsupported(backend, rows, columns=None, both_directions=False, has_additions=False, *_):
    """Why `backend` cannot run this call, or None if it can."""
    if backend in ("chunked", "reference"):
        return None
    device = rows.device.type
    if device == "cuda" and columns is not None and columns.dtype != rows.dtype:
        if rows.dtype != torch.float32 or columns.dtype not in (torch.float16, torch.bfloat16):
            return (
                f"on cuda columns of {columns.dtype} go with rows of that dtype or float32, not {rows.dtype}"
            )
        if both_directions is True or (columns.requires_grad and torch.is_grad_enabled()):
            return "on cuda columns of another dtype than rows get no gradient and no sums of their own"
        if has_additions is True and backend == "native":
            return (
                "its kernels take no columns of another dtype with column_bias, row_limit or only_equal_ids"
            )
    if backend == "native":
        if backends.extension is None:
            return backends.extension_missing
        if device == "cuda":
            return backends.native_unsupported(rows.device)
        return None if device == "cpu" else f"it runs on cpu and cuda, not on {device}"
    if device != "cuda":
        return f"it runs on cuda, not on {device}"
    return backends.triton_unsupported(rows.device) or importlib.import_module(_TRITON).unsupported(
        rows, columns
    )


OPERANDS, FLAGS = 6, 4  # how many tensors and flags every call has
SAVED = 11  # tensors that every call saves; the additions follow


def _forward(backend, needs, *args):
    """`args` are operands, additions if there are any, flags, and with additions only_equal_ids."""
    has_additions = len(args) > OPERANDS + FLAGS
    operands, additions, options = args[:OPERANDS], (), args[OPERANDS:]
    columns_need_grad = needs[1]
    if has_additions:
        additions, options = options[: -FLAGS - 1], options[-FLAGS - 1 :]
        columns_need_grad = columns_need_grad or needs[OPERANDS]
    flags, only = options[:FLAGS], options[FLAGS:]
    results = _fwd[backend](*operands, *flags, any(needs), columns_need_grad, *additions, *only)
    lse, column_lse, positive_logits, *norms, kept = results
    rows, _, scale, positives, _, _ = operands
    if holds_expectation(kept) and positives is None:  # backward reads rows and scale alone
        operands = (rows, None, scale, None, None, None)
    return (lse, column_lse, positive_logits), (*operands, lse, column_lse, *norms, kept, *additions)


def _backward(backend, needs, grads, saved, *options):
    grad_lse, grad_column_lse, grad_positive_logits = grads
    flags, only = options[:FLAGS], options[FLAGS:]
    both_directions = flags[-1]
    grads = (grad_lse, grad_column_lse if both_directions else None, grad_positive_logits)
    tensors, additions = saved[:SAVED], saved[SAVED:]
    by_bias = needs[OPERANDS : OPERANDS + 2] if additions else ()
    made = _bwd[backend](*grads, *tensors, *flags, *needs[:2], *additions, *only, *by_bias)
    if not additions:
        return made[:3]
    return *made[:3], None, None, None, *made[3:]


_operation = Operation(
    "contrastive",
    chunked,
    {
        "_fwd": (
            f"({_OPERANDS}, {_FLAGS}, bool keep, bool columns_need_grad, {_ADDITIONS},"
            " bool equal_weights=False) -> (Tensor lse, Tensor column_lse, Tensor positive_logits, Tensor row_rnorm,"
            " Tensor column_rnorm, Tensor kept)",
            {overload: partial(_fwd_fake, overload) for overload in OVERLOADS},
        ),
        "_bwd": (
            f"(Tensor? grad_lse, Tensor? grad_column_lse, Tensor? grad_positive_logits, {_OPERANDS}, Tensor lse,"
            f" Tensor column_lse, Tensor row_rnorm, Tensor column_rnorm, Tensor kept, {_FLAGS}, bool rows_need_grad,"
            f" bool columns_need_grad, {_ADDITIONS}, bool column_bias_needs_grad=False,"
            " bool row_bias_needs_grad=False) -> (Tensor grad_rows, Tensor grad_columns, Tensor grad_scale,"
            " Tensor grad_column_bias, Tensor grad_row_bias)",
            _bwd_fake,
        ),
    },
    unsupported=unsupported,
    preference=preference.CONTRASTIVE,
    forward=_forward,
    backward=_backward,
)
_fwd, _bwd = _operation.operators


def forward_of(backend, rows, columns, *, keep):
    """Results of the forward operator on rows and columns as they are, at scale 1, for `backward_of`."""
    one = rows.new_ones(())
    return _fwd[backend](rows, columns, one, None, None, None, False, False, False, False, keep, False)


def backward_of(backend, grad_lse, rows, columns, results, *, rows_need_grad=False, columns_need_grad=False):
    """(grad_rows, grad_columns, grad_scale) of the lse that `forward_of` gave among `results`."""
    lse, column_lse, _, row_rnorm, column_rnorm, kept = results
    saved = (lse, column_lse, row_rnorm, column_rnorm, kept)
    operands = (rows, columns, rows.new_ones(()), None, None, None)
    flags = (False, False, False, False)
    return _bwd[backend](grad_lse, None, None, *operands, *saved, *flags, rows_need_grad, columns_need_grad)


class Contrastive(NamedTuple):
    """What `contrastive` returns."""

    lse: torch.Tensor  # (N,) float64
    column_lse: torch.Tensor  # (M,) float64, (0,) unless both_directions
    positive_logits: torch.Tensor  # float64 in the shape of positives, (0,) without


def contrastive(
    rows,
    columns,
    scale,
    *,
    positives=None,
    row_ids=None,
    column_ids=None,
    normalize_rows=True,
    normalize_columns=True,
    keep_diagonal=False,
    both_directions=False,
    column_bias=None,
    row_bias=None,
    row_limit=None,
    exempt=None,
    only_equal_ids=False,
    equal_weights=False,
    backend=None,
    caller="contrastive",
):
    """Log-sum-exp of scale · <row, column> over each row's allowed columns, and the logits at `positives`.

    What the losses in `losses/` are made of. Checks of the user's input are the loss's; docs/contrastive.md is
    the contract.

    Args:
        rows: (N, D), float64, float32, float16 or bfloat16, any strides.
        columns: (M, D) like rows, or None: the rows themselves, and no row meets itself. May be of another dtype than
            rows (a bfloat16 queue), except that float64 goes with float64 alone.
        scale: 0-d tensor, float32 (float64 for float64 rows), on the device of rows. Gets its gradient.
        positives: (N,) or (N, P) int64 column indices whose logits are returned, negative ones counting from the
            end, or None.
        row_ids, column_ids: (N,) and (M,) int64, or None; pairs with equal ids stay out of the sums.
        normalize_rows, normalize_columns: L2-normalise first, as F.normalize does.
        keep_diagonal: Pair (i, i) stays in the sums although its ids are equal. Rectangular case only.
        both_directions: Also the log-sum-exp over rows for each column. Rectangular case only.
        column_bias: (M,) in the dtype of scale, or None: added to the logits in the sums of rows, not to those at
            positives. Gets its gradient; −inf leaves a column out.
        row_bias: (N,) like column_bias: added to the logits in the sums of columns. With both_directions only.
        row_limit: (N,) in the dtype of scale, or None: logits (without bias) above it are left out of all sums, but
            for positives of their row and exempt columns.
        exempt: (M,) bool, or None: columns that no limit leaves out. With row_limit only.
        only_equal_ids: Pairs of equal ids are those that stay.
        equal_weights: Every row's lse is expected to get the same gradient, as in a mean: the CPU kernel may make the
            gradients in forward. They are right either way.
        backend: One of `backends.BACKENDS`, or None.
        caller: Named in error messages.

    Returns:
        Contrastive(lse, column_lse, positive_logits).
    """
    has_additions = only_equal_ids or not (column_bias is None and row_bias is None and row_limit is None)
    call = [] if columns is None else [columns, both_directions]
    if has_additions:
        call = [columns, both_directions, True]
    chosen = backends.choose_backend("contrastive", backend, caller, rows, *call)
    if columns is None:
        normalize_columns = normalize_rows
    flags = (normalize_rows, normalize_columns, keep_diagonal, both_directions)
    additions = (column_bias, row_bias, row_limit, exempt, only_equal_ids) if has_additions else ()
    if chosen == "reference":
        with torch.autocast(rows.device.type, enabled=False):
            acc = accumulation_dtype(rows)
            rows, columns = savable(rows.to(acc)), None if columns is None else savable(columns.to(acc))
            positives = savable(positives)
            operands = (rows, columns, scale, positives, row_ids, column_ids)
            results = reference.contrastive(*operands, *flags, *map(_savable_tensor, additions))
            return Contrastive(*[result.double() for result in results])
    operands = (rows, columns, scale, positives, row_ids, column_ids)
    if chosen == "native":  # differentiates itself: csrc/ops/contrastive.cpp
        hint = {"equal_weights": True} if equal_weights else {}
        return Contrastive(*_fwd[chosen](*operands, *flags, False, False, *additions, **hint)[:3])
    if has_additions:
        operands, flags = (*operands, *additions[:-1]), (*flags, only_equal_ids)
    return Contrastive(*_operation.differentiate(chosen, operands, flags))


def _savable_tensor(addition):
    return addition if isinstance(addition, bool) else savable(addition)
