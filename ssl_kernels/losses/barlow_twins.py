"""Barlow Twins: features of two views that agree, each with itself alone."""

from typing import Any

import torch

from ssl_kernels.losses._features import checked_views, correlations
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import reduce
from ssl_kernels.ops.library import accumulation_dtype
from ssl_kernels.reference.clustering import cross_correlation

OP = "barlow_twins_loss"


def barlow_twins_loss(
    z0: torch.Tensor,
    z1: torch.Tensor,
    off_diagonal_weight: float | torch.Tensor = 0.005,
    *,
    eps: float = 1e-5,
    reduction: str = "sum",
    group: Any = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Redundancy reduction: the cross-correlation of the features of two views is to be the identity.

        loss = Σ_d (1 − c_dd)² + off_diagonal_weight · Σ_d Σ_{j ≠ d} c_dj²
        c_dj = 1 / N · Σ_i ẑ0_id ẑ1_ij,  ẑ_id = (z_id − mean_d) / sqrt(variance_d + eps) over the batch

    The normalisation and its gradient are part of the loss. What it costs are three products of N · D · D, one forward
    and one backward for each view; for a sum or mean with 2 N <= D in one process, four of N · N · D.

    Args:
        z0, z1: (N, D) each with N >= 2, row i of both a pair: what the projector makes of two views, not normalised.
            float64, float32, float16 or bfloat16, any strides. Under autocast they may differ in dtype; the wider one
            is used. Both get their gradient.
        off_diagonal_weight: A float or a tensor of one element, which gets its gradient.
        eps: Added to the variances, > 0, as `BatchNorm1d` does it.
        reduction: "sum" over the D features, which is the paper's loss, "mean", or "none".
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

    Source: Zbontar et al., Barlow Twins, arXiv:2103.03230, eq. 1 and 2.
    """
    weights = {"off_diagonal_weight": off_diagonal_weight}
    z0, z1, (weight,), eps, chosen, name, world = checked_views(
        OP, z0, z1, weights, eps, reduction, group, backend
    )
    if chosen == "reference":
        with torch.autocast(z0.device.type, enabled=False):
            acc = accumulation_dtype(z0)
            on_diagonal, off_diagonal = cross_correlation(z0.to(acc), z1.to(acc), eps)
    else:
        on_diagonal, off_diagonal = correlations(OP, chosen, name, world, z0, z1, eps, reduction != "none")
    loss = on_diagonal + weight * off_diagonal
    if loss.dim():
        return reduce(loss, reduction, z0)
    return (loss / z0.shape[1] if reduction == "mean" else loss).to(accumulation_dtype(z0))


barlow_twins_loss.operation = "row_pairs"


class BarlowTwinsLoss(Loss):
    """`ssl_kernels.barlow_twins_loss` as a module: `BarlowTwinsLoss(off_diagonal_weight=0.005)(z0, z1)`.

    Args:
        off_diagonal_weight: A float, a tensor of one element, or an `nn.Parameter` to learn it.
        eps, reduction, backend: As in `barlow_twins_loss`.
    """

    def __init__(
        self,
        off_diagonal_weight: float | torch.Tensor = 0.005,
        *,
        eps: float = 1e-5,
        reduction: str = "sum",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(self, z0: torch.Tensor, z1: torch.Tensor, *, group: Any = None) -> torch.Tensor:
        return barlow_twins_loss(z0, z1, group=group, **self.options)
