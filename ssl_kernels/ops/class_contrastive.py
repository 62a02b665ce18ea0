"""`class_contrastive`: `contrastive` of rows among themselves less the mean logit of each row's positives.

The gradient of a logit is a softmax less the positive's share; where a row has learned its class the two nearly cancel,
so they are subtracted entry by entry, before the products. docs/contrastive.md has the contract.
"""

from functools import partial

import torch

from ssl_kernels.chunked import class_contrastive as chunked
from ssl_kernels.constants import KEPT_HEADER
from ssl_kernels.ops.library import accumulation_dtype, refuse_torch_func, savable
from ssl_kernels.ops.operation import OVERLOADS, Operation
from ssl_kernels.reference import class_contrastive as reference


def _fwd_fake(overload, rows, scale, positives, normalize, keep):
    n, acc = rows.shape[0], accumulation_dtype(rows)
    keeps_logits = keep and overload == "native"
    return (
        *(rows.new_empty(n, dtype=torch.float64) for _ in range(3)),
        rows.new_empty(n if normalize else 0, dtype=acc),
        rows.new_empty(KEPT_HEADER if keeps_logits else 0, dtype=acc),
    )


def _bwd_fake(grad_losses, rows, scale, positives, counts, lse, row_rnorm, kept, normalize, rows_need_grad):
    grad_rows = rows.new_empty(rows.shape if rows_need_grad else (0,))
    return grad_rows, rows.new_empty((), dtype=accumulation_dtype(rows))


def _forward(backend, needs, rows, scale, positives, normalize):
    losses, counts, *saved = _fwd[backend](rows, scale, positives, normalize, any(needs))
    return (losses, counts), (rows, scale, positives, counts, *saved)


def _backward(backend, needs, grads, saved, normalize):
    rows_need_grad, _, _, _ = needs
    return _bwd[backend](grads[0], *saved, normalize, rows_need_grad)


_operation = Operation(
    "class_contrastive",
    chunked,
    {
        "_fwd": (
            "(Tensor rows, Tensor scale, Tensor positives, bool normalize, bool keep)"
            " -> (Tensor losses, Tensor counts, Tensor lse, Tensor row_rnorm, Tensor kept)",
            {overload: partial(_fwd_fake, overload) for overload in OVERLOADS},
        ),
        "_bwd": (
            "(Tensor grad_losses, Tensor rows, Tensor scale, Tensor positives, Tensor counts, Tensor lse,"
            " Tensor row_rnorm, Tensor kept, bool normalize, bool rows_need_grad)"
            " -> (Tensor grad_rows, Tensor grad_scale)",
            _bwd_fake,
        ),
    },
    chosen_by="contrastive",
    forward=_forward,
    backward=_backward,
)
_fwd, _bwd = _operation.operators


def takes_classes(backend, rows):
    """Whether `class_contrastive` runs on this backend of `contrastive`: there are no GPU kernels of it."""
    return backend in ("chunked", "reference") or (backend == "native" and rows.device.type == "cpu")


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
    if backend == "native":  # differentiates itself: csrc/ops/class_contrastive.cpp
        refuse_torch_func("class_contrastive", backend)
        return _fwd[backend](rows, scale, positives, normalize, False)[:2]
    losses, counts = _operation.differentiate(backend, (rows, scale, positives), (normalize,))
    return losses, counts.detach()
