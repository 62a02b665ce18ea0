"""BYOL's regression of unit rows."""

import torch

from ssl_kernels.checks import check_reduction
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._rows import row_pairs_loss
from ssl_kernels.losses._shared import checked_rows

OP = "byol_loss"


def byol_loss(
    prediction: torch.Tensor,
    target: torch.Tensor,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """BYOL's loss: the squared distance of unit rows, 2 − 2 cos(prediction_i, target_i).

    The target gets no gradient. BYOL adds the loss of the two views swapped; so does the caller.

    Args:
        prediction, target: (N, D) each. float64, float32, float16 or bfloat16, any strides. Under autocast they may
            differ in dtype; the wider one is used.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12). False takes 2 − 2 <p, t>.
        reduction: "mean" over the N rows, "sum", or "none".
        row_weights: (N,) floating, or None. "none" and "sum" take weight · loss, "mean" divides their sum by that of
            the weights.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none".

    Raises:
        TypeError: prediction or target is no floating tensor, or their dtypes differ outside autocast.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, an unknown reduction or backend, or a
            backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Grill et al., BYOL, arXiv:2006.07733, eq. 2.
    """
    prediction, target = checked_rows(OP, 2, prediction=prediction, target=target)
    check_reduction(OP, reduction, row_weights, prediction.shape[0], prediction)
    return row_pairs_loss(
        prediction,
        target.detach(),
        factor=-2.0,
        constant=2.0,
        normalize=normalize,
        measure="product",
        reduction=reduction,
        row_weights=row_weights,
        backend=backend,
        caller=OP,
    )


byol_loss.operation = "row_pairs"


class BYOLLoss(Loss):
    """`ssl_kernels.byol_loss` as a module: `BYOLLoss()(prediction, target)`.

    Args:
        normalize, reduction, backend: As in `byol_loss`.
    """

    def __init__(
        self, *, normalize: bool = True, reduction: str = "mean", backend: str | None = None
    ) -> None:
        super().__init__(locals())

    def forward(
        self, prediction: torch.Tensor, target: torch.Tensor, *, row_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        return byol_loss(prediction, target, row_weights=row_weights, **self.options)
