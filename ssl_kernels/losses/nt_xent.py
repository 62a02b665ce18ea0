"""NT-Xent, the loss of SimCLR."""

import torch

from ssl_kernels.checks import check_reduction, check_scalar
from ssl_kernels.losses._labels import as_ids
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import (
    as_scalar,
    checked_rows,
    infinite_as_nan,
    inverse_operand,
    minus_log_sigmoid,
    reduce,
    stacked,
)
from ssl_kernels.losses._softmax import sums_of_views, views_loss


def nt_xent_loss(
    z0: torch.Tensor,
    z1: torch.Tensor,
    temperature: float | torch.Tensor = 0.5,
    *,
    ids: torch.Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """NT-Xent, the loss of SimCLR: each of the 2B views against its partner and the 2B − 2 others.

        loss_i = −log( exp(s_i,p(i)) / Σ_{j ≠ i} exp(s_ij) ),  s_ij = <z_i, z_j> / temperature

    over the rows z of z0 above z1, where p(i) is the other view of i. Natural logarithm.

    Args:
        z0, z1: Embeddings of the two views, (B, D) each, row i of both from the same sample. float64, float32,
            float16 or bfloat16, any strides. Under autocast they may differ in dtype; the wider one is used.
        temperature: > 0, a float or a tensor of one element, which gets its gradient.
        ids: (B,) or (B, 1) integers or bool, or None. Views of other samples of equal ids are no negatives of each
            other: known duplicates. A view's partner stays; a view without a negative has loss 0.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12).
        reduction: "mean" over the 2B rows, "sum", or "none".
        row_weights: (2B,) floating, or None, the rows of z0 first. "none" and "sum" take weight · loss, "mean"
            divides their sum by that of the weights.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (2B,) for "none", the rows of z0 first.

    Raises:
        TypeError: z0 or z1 is no floating tensor, or their dtypes differ outside autocast.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, temperature not > 0, an unknown reduction
            or backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Chen et al., SimCLR, arXiv:2002.05709, eq. 1.
    """
    op = "nt_xent_loss"
    z0, z1 = checked_rows(op, 2, z0=z0, z1=z1)
    check_scalar(op, "temperature", temperature, z0, positive=True)
    check_reduction(op, reduction, row_weights, 2 * z0.shape[0], z0)
    if ids is not None:
        ids = as_ids(op, "ids", ids, (z0.shape[0],), z0)
    scale = inverse_operand(temperature, z0)
    options = {"normalize": normalize, "backend": backend, "caller": op}
    if ids is None:
        return views_loss(z0, z1, scale, reduction, row_weights, **options)
    # Where the partner is left out of the sum too.
    views = stacked(z0, z1)
    lse, positive = sums_of_views(views, as_scalar(scale, z0), ids.repeat(2), **options)
    loss = minus_log_sigmoid(infinite_as_nan(positive) - infinite_as_nan(lse))
    return reduce(loss, reduction, views, row_weights)


nt_xent_loss.operation = "contrastive"
nt_xent_loss.views = 2


class NTXentLoss(Loss):
    """`ssl_kernels.nt_xent_loss` as a module: `NTXentLoss(temperature=0.5)(z0, z1)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        normalize, reduction, backend: As in `nt_xent_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.5,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        z0: torch.Tensor,
        z1: torch.Tensor,
        *,
        ids: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return nt_xent_loss(z0, z1, ids=ids, row_weights=row_weights, **self.options)
