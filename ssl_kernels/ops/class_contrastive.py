"""`class_contrastive`: `contrastive` of rows among themselves less the mean logit of each row's positives.

The gradient of a logit is a softmax less the positive's share; where a row has learned its class the two nearly cancel,
so they are subtracted entry by entry, before the products. docs/contrastive.md has the contract.
"""

import torch

from ssl_kernels.chunked import class_contrastive as chunked
from ssl_kernels.ops.contrastive import KEPT_HEADER
from ssl_kernels.ops.library import accumulation_dtype, define, library, refuse_torch_func, savable
from ssl_kernels.reference import class_contrastive as reference


def _fwd_fake(overload, rows, scale, positives, normalize, keep):
    n, acc = rows.shape[0], accumulation_dtype(rows)
    keeps_logits = keep and overload == "native"
    return (
        *(rows.new_empty(n, dtype=torch.float64) for _ in range(3)),
        rows.new_empty(n if normalize else 0, dtype=acc),
        rows.new_empty(KEPT_HEADER if keeps_logits else 0, dtype=acc),
    )


def _bwd_fake(
    overload, grad_losses, rows, scale, positives, counts, lse, row_rnorm, kept, normalize, rows_need_grad
):
    grad_rows = rows.new_empty(rows.shape if rows_need_grad else (0,))
    return grad_rows, rows.new_empty((), dtype=accumulation_dtype(rows))


_fwd = define(
    "class_contrastive_fwd",
    "(Tensor rows, Tensor scale, Tensor positives, bool normalize, bool keep)"
    " -> (Tensor losses, Tensor counts, Tensor lse, Tensor row_rnorm, Tensor kept)",
    _fwd_fake,
)
_bwd = define(
    "class_contrastive_bwd",
    "(Tensor grad_losses, Tensor rows, Tensor scale, Tensor positives, Tensor counts, Tensor lse, Tensor row_rnorm,"
    " Tensor kept, bool normalize, bool rows_need_grad) -> (Tensor grad_rows, Tensor grad_scale)",
    _bwd_fake,
)

library.impl("class_contrastive_fwd.chunked", chunked.class_contrastive_fwd, "CompositeExplicitAutograd")
library.impl("class_contrastive_bwd.chunked", chunked.class_contrastive_bwd, "CompositeExplicitAutograd")


def takes_classes(backend, rows):
    """Whether `class_contrastive` runs on this backend of `contrastive`: there are no GPU kernels of it."""
    return backend in ("chunked", "reference") or (backend == "native" and rows.device.type == "cpu")


class _Backward(torch.autograd.Function):
    """The backward operator inside a graph of its own, so that differentiating it again is an error."""

    @staticmethod
    def forward(ctx, *args):
        return _bwd["chunked"](*args)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            'class_contrastive: backend "chunked" has no second derivative; backend="reference" has one'
        )


class _ClassContrastive(torch.autograd.Function):
    """Forward and backward operator of the backend that does not differentiate itself."""

    @staticmethod
    def forward(ctx, rows, scale, positives, normalize):
        losses, counts, *saved = _fwd["chunked"](rows, scale, positives, normalize, any(ctx.needs_input_grad))
        ctx.save_for_backward(*map(savable, (rows, scale, positives, counts)), *saved)
        ctx.normalize = normalize
        ctx.mark_non_differentiable(counts)
        return losses, counts

    @staticmethod
    def backward(ctx, grad_losses, _):
        rows_need_grad, scale_needs_grad = ctx.needs_input_grad[:2]
        run = _Backward.apply if torch.is_grad_enabled() else _bwd["chunked"]
        grad_rows, grad_scale = run(grad_losses, *ctx.saved_tensors, ctx.normalize, rows_need_grad)
        return grad_rows if rows_need_grad else None, grad_scale if scale_needs_grad else None, None, None


def class_contrastive(rows, scale, positives, *, normalize=True, backend):
    """lse_i over all other rows, less the mean logit of i's positives; 0 where it has none.

    What `sup_con_loss` is made of. Checks of the user's input are the loss's.

    Args:
        rows: (N, D), float64, float32, float16 or bfloat16, any strides.
        scale: 0-d tensor in the accumulation dtype of rows. Gets its gradient.
        positives: Which other rows are a row's positives: (N,) int64, those of its number; (N, W) int64, those that
            have one of its bits; (N, N) bool, those where its row says so.
        normalize: L2-normalise first, as F.normalize does.
        backend: One for which `takes_classes` holds.

    Returns:
        losses, counts: (N,) float64 each; how many positives each row has gets no gradient.
    """
    if backend == "reference":
        with torch.autocast(rows.device.type, enabled=False):
            rows = savable(rows.to(accumulation_dtype(rows)))
            return reference.class_contrastive(rows, scale, positives, normalize)
    refuse_torch_func("class_contrastive", backend)
    if backend == "native":  # differentiates itself: csrc/ops/class_contrastive.cpp
        return _fwd[backend](rows, scale, positives, normalize, False)[:2]
    return _ClassContrastive.apply(rows, scale, positives, normalize)
