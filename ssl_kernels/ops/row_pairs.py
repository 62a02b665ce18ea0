"""`row_pairs`: products or distances of paired rows in one pass over them. docs/row_pairs.md is the contract."""

import torch

from ssl_kernels import backends
from ssl_kernels.chunked import row_pairs as chunked
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
from ssl_kernels.reference import row_pairs as reference

MEASURES = ("product", "distance")
_TRITON = "ssl_kernels.triton.row_pairs"


def _fwd_fake(overload, x, y, z, normalize, measure):
    pairs = 1 if z is None else 2
    return (
        x.new_empty(x.shape[0], dtype=torch.float64),
        x.new_empty((x.shape[0], pairs, 4), dtype=accumulation_dtype(x)),
    )


def _bwd_fake(overload, grad_values, x, y, z, saved, normalize, measure, *needs_grad):
    return tuple(x.new_empty(x.shape if need else (0,)) for need in needs_grad)


_fwd = define(
    "row_pairs_fwd",
    "(Tensor x, Tensor y, Tensor? z, bool normalize, str measure) -> (Tensor values, Tensor saved)",
    _fwd_fake,
)
_bwd = define(
    "row_pairs_bwd",
    "(Tensor grad_values, Tensor x, Tensor y, Tensor? z, Tensor saved, bool normalize, str measure,"
    " bool x_needs_grad, bool y_needs_grad, bool z_needs_grad) -> (Tensor grad_x, Tensor grad_y, Tensor grad_z)",
    _bwd_fake,
)

library.impl("row_pairs_fwd.chunked", chunked.row_pairs_fwd, "CompositeExplicitAutograd")
library.impl("row_pairs_bwd.chunked", chunked.row_pairs_bwd, "CompositeExplicitAutograd")
implement_in_triton(("row_pairs_fwd", "row_pairs_bwd"), _TRITON)
backends.register_operation("row_pairs", where_it_runs("row_pairs_fwd", _TRITON))


class _Backward(torch.autograd.Function):
    """Gradients inside a graph of their own, so that differentiating them again is an error."""

    @staticmethod
    def forward(ctx, backend, make, *dependencies):
        ctx.backend = backend
        return make()

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f'row_pairs: backend "{ctx.backend}" has no second derivative; backend="reference" has one'
        )


class _RowPairs(torch.autograd.Function):
    """Forward and backward operator of a backend that does not differentiate itself."""

    @staticmethod
    def forward(ctx, backend, x, y, z, normalize, measure):
        values, saved = _fwd[backend](x, y, z, normalize, measure)
        ctx.save_for_backward(*map(savable, (x, y, z)), saved)
        ctx.backend, ctx.options = backend, (normalize, measure)
        return values

    @staticmethod
    def backward(ctx, grad_values):
        *operands, saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:4]

        def make():
            return _bwd[ctx.backend](grad_values, *operands, saved, *ctx.options, *needed)

        again = torch.is_grad_enabled()
        grads = _Backward.apply(ctx.backend, make, grad_values, *operands) if again else make()
        return None, *(grad if need else None for grad, need in zip(grads, needed, strict=True)), None, None


def row_pairs(x, y, z=None, *, normalize, measure, backend=None, caller="row_pairs"):
    """m(x_i, y_i), less m(x_i, z_i) where there is a z, of the measure m: <x̂, ŷ> or ‖x̂ − ŷ‖₂.

    What `byol_loss` and `triplet_margin_loss` are made of. Checks of the user's input are the loss's;
    docs/row_pairs.md is the contract.

    Args:
        x: (N, D), float64, float32, float16 or bfloat16, any strides.
        y, z: Like x; z may be None. All get their gradients.
        normalize: L2-normalise first, as F.normalize does.
        measure: One of `MEASURES`.
        backend: One of `backends.BACKENDS`, or None.
        caller: Named in error messages.

    Returns:
        (N,) float64.
    """
    chosen = backends.choose_backend("row_pairs", backend, caller, x, y)
    if chosen == "reference":
        with torch.autocast(x.device.type, enabled=False):
            acc = accumulation_dtype(x)
            x, y, z = (None if rows is None else savable(rows.to(acc)) for rows in (x, y, z))
            return reference.row_pairs(x, y, z, normalize, measure).double()
    if chosen == "native":  # differentiates itself: csrc/ops/row_pairs_autograd.cpp
        return _fwd[chosen](x, y, z, normalize, measure)[0]
    refuse_torch_func("row_pairs", chosen)
    return _RowPairs.apply(chosen, *distinct(x, y, z), normalize, measure)
