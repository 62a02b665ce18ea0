"""Alignment: how near the two rows of a pair lie."""

import torch

from ssl_kernels.checks import check_reduction, check_scalar
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._rows import row_pairs_loss
from ssl_kernels.losses._shared import checked_rows

OP = "alignment_loss"


def alignment_loss(
    x: torch.Tensor,
    y: torch.Tensor,
    alpha: float | torch.Tensor = 2.0,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """Distance of the two rows of a pair, to a power: the partner of `uniformity_loss`.

        loss_i = ‖x̂_i − ŷ_i‖₂^alpha

    Args:
        x, y: (N, D) each, row i of both a pair. float64, float32, float16 or bfloat16, any strides. Under autocast they
            may differ in dtype; the wider one is used. Both get their gradient, which at distance 0 is 0.
        alpha: > 0, a float or a tensor of one element, which gets its gradient.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12).
        reduction: "mean" over the N pairs, "sum", or "none".
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none".

    Raises:
        TypeError: x or y is no floating tensor, their dtypes differ outside autocast, or alpha is no number.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, alpha not > 0, an unknown reduction or
            backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Wang & Isola, arXiv:2005.10242, eq. 2 and figure 5.
    """
    x, y = checked_rows(OP, 2, x=x, y=y)
    check_scalar(OP, "alpha", alpha, x, positive=True)
    check_reduction(OP, reduction)
    options = {"normalize": normalize, "measure": "distance", "reduction": reduction, "backend": backend}
    return row_pairs_loss(x, y, rule="power", constant=alpha, **options, caller=OP)


alignment_loss.operation = "row_pairs"


class AlignmentLoss(Loss):
    """`ssl_kernels.alignment_loss` as a module: `AlignmentLoss(alpha=2.0)(x, y)`.

    Args:
        alpha: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        normalize, reduction, backend: As in `alignment_loss`.
    """

    def __init__(
        self,
        alpha: float | torch.Tensor = 2.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return alignment_loss(x, y, **self.options)
