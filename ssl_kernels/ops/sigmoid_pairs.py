"""`sigmoid_pairs`: the pairwise sigmoid loss over streamed tiles. docs/sigmoid_pairs.md has the mathematics."""

import torch

from ssl_kernels import backends
from ssl_kernels.chunked import sigmoid_pairs as chunked
from ssl_kernels.ops.library import (
    accumulation_dtype,
    define,
    distinct,
    implement_in_triton,
    library,
    refuse_torch_func,
    savable,
    where_it_runs,
)
from ssl_kernels.reference import sigmoid_pairs as reference

_TRITON = "ssl_kernels.triton.sigmoid_pairs"
_OPERANDS = "Tensor rows, Tensor columns, Tensor scale, Tensor bias, int diagonal"
_NORMALIZE = "bool normalize_rows, bool normalize_columns"
_NEEDS = "bool rows_need_grad, bool columns_need_grad"
_GRADIENTS = "Tensor grad_rows, Tensor grad_columns, Tensor grad_scale, Tensor grad_bias"


def _gradient_fakes(rows, columns, dtype, rows_need_grad, columns_need_grad):
    acc = accumulation_dtype(rows)
    return (
        rows.new_empty(rows.shape if rows_need_grad else (0,), dtype=dtype),
        rows.new_empty(columns.shape if columns_need_grad else (0,), dtype=dtype),
        rows.new_empty((), dtype=acc),
        rows.new_empty((), dtype=acc),
    )


def _fwd_fake(
    overload,
    rows,
    columns,
    scale,
    bias,
    diagonal,
    normalize_rows,
    normalize_columns,
    total,
    keep,
    rows_need_grad,
    columns_need_grad,
):
    acc = accumulation_dtype(rows)
    losses = rows.new_empty(() if total else rows.shape[0], dtype=torch.float64)
    if total and keep:
        return losses, *_gradient_fakes(rows, columns, acc, rows_need_grad, columns_need_grad)
    return losses, *(rows.new_empty(0, dtype=acc) for _ in range(4))


def _bwd_fake(
    overload,
    grad_losses,
    rows,
    columns,
    scale,
    bias,
    diagonal,
    normalize_rows,
    normalize_columns,
    rows_need_grad,
    columns_need_grad,
):
    return _gradient_fakes(rows, columns, rows.dtype, rows_need_grad, columns_need_grad)


_fwd = define(
    "sigmoid_pairs_fwd",
    f"({_OPERANDS}, {_NORMALIZE}, bool total, bool keep, {_NEEDS}) -> (Tensor losses, {_GRADIENTS})",
    _fwd_fake,
)
_bwd = define(
    "sigmoid_pairs_bwd",
    f"(Tensor grad_losses, {_OPERANDS}, {_NORMALIZE}, {_NEEDS}) -> ({_GRADIENTS})",
    _bwd_fake,
)

library.impl("sigmoid_pairs_fwd.chunked", chunked.sigmoid_pairs_fwd, "CompositeExplicitAutograd")
library.impl("sigmoid_pairs_bwd.chunked", chunked.sigmoid_pairs_bwd, "CompositeExplicitAutograd")
implement_in_triton(("sigmoid_pairs_fwd", "sigmoid_pairs_bwd"), _TRITON)
backends.register_operation("sigmoid_pairs", where_it_runs("sigmoid_pairs_fwd", _TRITON))


class _Backward(torch.autograd.Function):
    """Gradients inside a graph of their own, so that differentiating them again is an error."""

    @staticmethod
    def forward(ctx, backend, make, *dependencies):
        ctx.backend = backend
        return make()

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f'sigmoid_pairs: backend "{ctx.backend}" has no second derivative; backend="reference" has one'
        )


class _SigmoidPairs(torch.autograd.Function):
    """Forward and backward operator of a backend that does not differentiate itself."""

    @staticmethod
    def forward(ctx, backend, rows, columns, scale, bias, diagonal, normalize_rows, normalize_columns, total):
        operands = (rows, columns, scale, bias)
        ctx.options = (diagonal, normalize_rows, normalize_columns)
        needs = ctx.needs_input_grad[1:3]
        losses, *grads = _fwd[backend](*operands, *ctx.options, total, any(ctx.needs_input_grad), *needs)
        ctx.save_for_backward(*map(savable, operands), *(grads if total else ()))
        ctx.backend = backend
        return losses

    @staticmethod
    def backward(ctx, grad_losses):
        operands, made = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        needed = ctx.needs_input_grad[1:5]

        def make():
            if made:
                pairs = zip(made, operands, strict=True)
                return tuple((grad * grad_losses).to(operand.dtype) for grad, operand in pairs)
            return _bwd[ctx.backend](grad_losses, *operands, *ctx.options, *needed[:2])

        again = torch.is_grad_enabled()
        grads = _Backward.apply(ctx.backend, make, grad_losses, *operands) if again else make()
        return None, *(grad if need else None for grad, need in zip(grads, needed, strict=True)), *[None] * 4


def sigmoid_pairs(
    rows,
    columns,
    scale,
    bias,
    *,
    diagonal=0,
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
        normalize_rows, normalize_columns: L2-normalise first, as F.normalize does.
        total: The sum over rows, whose gradient is made in the forward pass.
        backend: One of `backends.BACKENDS`, or None.
        caller: Named in error messages.

    Returns:
        Losses, float64: (N,), or 0-d with `total`.
    """
    chosen = backends.choose_backend("sigmoid_pairs", backend, caller, rows, columns)
    options = (diagonal, normalize_rows, normalize_columns, total)
    if chosen == "reference":
        with torch.autocast(rows.device.type, enabled=False):
            acc = accumulation_dtype(rows)
            return reference.sigmoid_pairs(
                savable(rows.to(acc)), savable(columns.to(acc)), scale, bias, *options
            ).double()
    if chosen == "native":  # differentiates itself: csrc/ops/sigmoid_pairs_autograd.cpp
        return _fwd[chosen](rows, columns, scale, bias, *options, False, False, False)[0]
    refuse_torch_func("sigmoid_pairs", chosen)
    return _SigmoidPairs.apply(chosen, *distinct(rows, columns, scale, bias), *options)
