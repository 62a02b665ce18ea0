"""VICReg: two views alike, features that vary, and no two of them together."""

from typing import Any

import torch

from ssl_kernels.losses._features import checked_views, covariances, mean_squares
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import reduce
from ssl_kernels.ops.library import accumulation_dtype
from ssl_kernels.reference.clustering import moments

OP = "vicreg_loss"


def vicreg_loss(
    z0: torch.Tensor,
    z1: torch.Tensor,
    invariance: float | torch.Tensor = 25.0,
    variance: float | torch.Tensor = 25.0,
    covariance: float | torch.Tensor = 1.0,
    *,
    eps: float = 1e-4,
    reduction: str = "mean",
    group: Any = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Variance, invariance and covariance of the features of two views.

        loss = 1 / D · Σ_d invariance · mean_i (z0_id − z1_id)²
                         + variance · ½ Σ_z max(0, 1 − sqrt(C(z)_dd + eps)) + covariance · Σ_z Σ_{j ≠ d} C(z)_dj²

    over z in {z0, z1}, with C(z) the covariance matrix of the features over the batch, divided by N − 1. What it costs
    are four products of N · D · D, one forward and one backward for each view; for a mean or sum with 2 N <= D in one
    process, four of N · N · D.

    Args:
        z0, z1: (N, D) each with N >= 2, row i of both a pair: what the expander makes of two views, not normalised.
            float64, float32, float16 or bfloat16, any strides. Under autocast they may differ in dtype; the wider one
            is used. Both get their gradient.
        invariance, variance, covariance: The terms' weights, each a float or a tensor of one element, which gets its
            gradient.
        eps: Added to the variances, > 0.
        reduction: "mean" over the D features, which is the paper's loss, "sum", or "none".
        group: A process group whose ranks' rows are one batch, or None for this process alone. Every rank returns the
            loss of the whole batch, and the mean over the ranks of their gradients is its gradient.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`). The products
            are torch's on all of them.

    Returns:
        float32 (float64 for float64 input): a scalar, or (D,) for "none".

    Raises:
        TypeError: z0 or z1 is no floating tensor, their dtypes differ outside autocast, or a weight is no number.
        ValueError: Shapes that do not fit, fewer than 2 rows, mixed devices, eps not > 0, an unknown reduction or
            backend, "reference" with a group, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference", or a group is given and
            torch.distributed is not initialised.

    Source: Bardes et al., VICReg, arXiv:2105.04906, eq. 1 to 6.
    """
    weights = {"invariance": invariance, "variance": variance, "covariance": covariance}
    z0, z1, (invariance, variance, covariance), eps, chosen, name, world = checked_views(
        OP, z0, z1, weights, eps, reduction, group, backend
    )
    summed_up = reduction != "none" and chosen != "reference"
    if chosen == "reference":
        with torch.autocast(z0.device.type, enabled=False):
            acc = accumulation_dtype(z0)
            rows = z0.to(acc), z1.to(acc)
            apart = (rows[0] - rows[1]).square().mean(0)
            of_views = [moments(each) for each in rows]
    else:
        apart = mean_squares(OP, chosen, name, world, z0, z1)
        of_views = [covariances(OP, chosen, name, world, each, summed_up) for each in (z0, z1)]
    loss, together = invariance * apart, 0
    for variances, others in of_views:
        loss = loss + variance / 2 * torch.relu(1 - (variances + eps).sqrt())
        together = together + covariance * others
    if not summed_up:
        return reduce(loss + together, reduction, z0)
    together = together / z0.shape[1] if reduction == "mean" else together
    return reduce(loss, reduction, z0) + together.to(accumulation_dtype(z0))


vicreg_loss.operation = "row_pairs"


class VICRegLoss(Loss):
    """`ssl_kernels.vicreg_loss` as a module: `VICRegLoss()(z0, z1)`.

    Args:
        invariance, variance, covariance: A float, a tensor of one element, or an `nn.Parameter` to learn it.
        eps, reduction, backend: As in `vicreg_loss`.
    """

    def __init__(
        self,
        invariance: float | torch.Tensor = 25.0,
        variance: float | torch.Tensor = 25.0,
        covariance: float | torch.Tensor = 1.0,
        *,
        eps: float = 1e-4,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(self, z0: torch.Tensor, z1: torch.Tensor, *, group: Any = None) -> torch.Tensor:
        return vicreg_loss(z0, z1, group=group, **self.options)
