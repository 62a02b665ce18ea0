"""`row_pairs`: products or distances of paired rows in one pass over them. docs/row_pairs.md is the contract."""

import torch

from ssl_kernels import backends
from ssl_kernels.chunked import row_pairs as chunked
from ssl_kernels.ops.library import accumulation_dtype, savable
from ssl_kernels.ops.operation import Operation
from ssl_kernels.reference import row_pairs as reference

MEASURES = ("product", "distance")


def _fwd_fake(x, y, z, normalize, measure):
    pairs = 1 if z is None else 2
    return (
        x.new_empty(x.shape[0], dtype=torch.float64),
        x.new_empty((x.shape[0], pairs, 4), dtype=accumulation_dtype(x)),
    )


def _bwd_fake(grad_values, x, y, z, saved, normalize, measure, *needs_grad):
    return tuple(x.new_empty(x.shape if need else (0,)) for need in needs_grad)


def _forward(backend, _, x, y, z, normalize, measure):
    values, saved = _fwd[backend](x, y, z, normalize, measure)
    return values, (x, y, z, saved)


def _backward(backend, needs, grads, saved, normalize, measure):
    return _bwd[backend](*grads, *saved, normalize, measure, *needs[:3])


_operation = Operation(
    "row_pairs",
    chunked,
    {
        "_fwd": (
            "(Tensor x, Tensor y, Tensor? z, bool normalize, str measure) -> (Tensor values, Tensor saved)",
            _fwd_fake,
        ),
        "_bwd": (
            "(Tensor grad_values, Tensor x, Tensor y, Tensor? z, Tensor saved, bool normalize, str measure,"
            " bool x_needs_grad, bool y_needs_grad, bool z_needs_grad)"
            " -> (Tensor grad_x, Tensor grad_y, Tensor grad_z)",
            _bwd_fake,
        ),
    },
    forward=_forward,
    backward=_backward,
)
_fwd, _bwd = _operation.operators


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
    return _operation.differentiate(chosen, (x, y, z), (normalize, measure))
