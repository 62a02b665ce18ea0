"""`sigmoid_pairs`: the pairwise sigmoid loss over streamed tiles. docs/sigmoid_pairs.md has the mathematics."""

import torch

from ssl_kernels import backends
from ssl_kernels.arguments import SigmoidPairsBackward, SigmoidPairsForward
from ssl_kernels.chunked import sigmoid_pairs as chunked
from ssl_kernels.ops.library import accumulation_dtype, savable
from ssl_kernels.ops.operation import Operation
from ssl_kernels.reference import sigmoid_pairs as reference

_OPERANDS = "Tensor rows, Tensor columns, Tensor scale, Tensor bias, int diagonal"
_NORMALIZE = "bool normalize_rows, bool normalize_columns"
_NEEDS = "bool rows_need_grad, bool columns_need_grad"
# Last, with defaults: most calls have none of them.
_IDS = "Tensor? row_ids=None, Tensor? column_ids=None, bool equal_ids_are_positive=False"
_GRADIENTS = "Tensor grad_rows, Tensor grad_columns, Tensor grad_scale, Tensor grad_bias"


def _gradient_fakes(call, dtype):
    rows, acc = call.rows, accumulation_dtype(call.rows)
    return (
        rows.new_empty(rows.shape if call.rows_need_grad else (0,), dtype=dtype),
        rows.new_empty(call.columns.shape if call.columns_need_grad else (0,), dtype=dtype),
        rows.new_empty((), dtype=acc),
        rows.new_empty((), dtype=acc),
    )


def _fwd_fake(*args):
    call = SigmoidPairsForward(*args)
    acc = accumulation_dtype(call.rows)
    losses = call.rows.new_empty(() if call.total else call.rows.shape[0], dtype=torch.float64)
    if call.total and call.keep:
        return losses, *_gradient_fakes(call, acc)
    return losses, *(call.rows.new_empty(0, dtype=acc) for _ in range(4))


def _bwd_fake(*args):
    call = SigmoidPairsBackward(*args)
    return _gradient_fakes(call, call.rows.dtype)


OPERANDS, OPTIONS = 4, 4  # how many tensors and options every call has


def _forward(backend, needs, *args):
    """`args` are operands, ids if there are any, options, and with ids equal_ids_are_positive."""
    operands, ids, options, sense = args[:OPERANDS], (), args[OPERANDS:], ()
    if len(options) > OPTIONS:
        ids, options, sense = options[:2], options[2:-1], options[-1:]
    losses, *grads = _fwd[backend](*operands, *options, any(needs), *needs[:2], *ids, *sense)
    total = options[-1]
    return losses, (*operands, *(grads if total else ids))


def _backward(backend, needs, grads, saved, *options):
    (grad_losses,), operands, more = grads, saved[:OPERANDS], saved[OPERANDS:]
    options, sense = options[:OPTIONS], options[OPTIONS:]
    *flags, total = options
    if total:
        pairs = zip(more, operands, strict=True)
        return tuple((grad * grad_losses).to(operand.dtype) for grad, operand in pairs)
    return _bwd[backend](grad_losses, *operands, *flags, *needs[:2], *more, *sense)


_operation = Operation(
    "sigmoid_pairs",
    chunked,
    {
        "_fwd": (
            f"({_OPERANDS}, {_NORMALIZE}, bool total, bool keep, {_NEEDS}, {_IDS})"
            f" -> (Tensor losses, {_GRADIENTS})",
            _fwd_fake,
        ),
        "_bwd": (
            f"(Tensor grad_losses, {_OPERANDS}, {_NORMALIZE}, {_NEEDS}, {_IDS}) -> ({_GRADIENTS})",
            _bwd_fake,
        ),
    },
    forward=_forward,
    backward=_backward,
)
_fwd, _bwd = _operation.operators


def sigmoid_pairs(
    rows,
    columns,
    scale,
    bias,
    *,
    diagonal=0,
    row_ids=None,
    column_ids=None,
    equal_ids_are_positive=False,
    normalize_rows=True,
    normalize_columns=True,
    total=False,
    backend=None,
    caller="sigmoid_pairs",
):
    """Sum over each row's pairs of softplus(−y z), z = scale · <row, column> + bias, y = +1 on a diagonal, else −1.

    What `siglip_loss` is made of. Checks of the user's input are the loss's; docs/sigmoid_pairs.md is the contract.

    Args:
        rows: (N, D), float64, float32, float16 or bfloat16, any strides.
        columns: (M, D) like rows.
        scale, bias: 0-d tensors, float32 (float64 for float64 rows), on the device of rows. Get their gradients.
        diagonal: Pairs (i, i + diagonal) are the positive ones, as `torch.diagonal` counts.
        row_ids, column_ids: (N,) and (M,) int64, or None. Pairs of equal ids that are not positive stay out of the sum.
        equal_ids_are_positive: Pairs of equal ids are the positive ones, and the diagonal is not looked at.
        normalize_rows, normalize_columns: L2-normalise first, as F.normalize does.
        total: The sum over rows, whose gradient is made in the forward pass.
        backend: One of `backends.BACKENDS`, or None.
        caller: Named in error messages.

    Returns:
        Losses, float64: (N,), or 0-d with `total`.
    """
    chosen = backends.choose_backend("sigmoid_pairs", backend, caller, rows, columns)
    options = (diagonal, normalize_rows, normalize_columns, total)
    ids = () if row_ids is None else (row_ids, column_ids)
    sense = (equal_ids_are_positive,) if ids else ()
    if chosen == "reference":
        with torch.autocast(rows.device.type, enabled=False):
            acc = accumulation_dtype(rows)
            return reference.sigmoid_pairs(
                savable(rows.to(acc)),
                savable(columns.to(acc)),
                scale,
                bias,
                *options,
                *map(savable, ids),
                *sense,
            ).double()
    if chosen == "native":  # differentiates itself: csrc/ops/sigmoid_pairs_autograd.cpp
        return _fwd[chosen](rows, columns, scale, bias, *options, False, False, False, *ids, *sense)[0]
    return _operation.differentiate(chosen, (rows, columns, scale, bias, *ids), (*options, *sense))
