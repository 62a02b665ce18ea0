"""DCL: NT-Xent whose denominator leaves the positive out."""

import torch

from ssl_kernels.checks import check_least_rows, check_reduction, check_scalar
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import checked_rows, inverse_operand
from ssl_kernels.losses._softmax import views_loss

OP = "dcl_loss"


def dcl_loss(
    z0: torch.Tensor,
    z1: torch.Tensor,
    temperature: float | torch.Tensor = 0.1,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Decoupled contrastive loss: NT-Xent with the positive left out of the sum.

        loss_i = −s_i,p(i) + log Σ_{j ≠ i, p(i)} exp(s_ij),  s_ij = <z_i, z_j> / temperature

    over the rows z of z0 above z1, where p(i) is the other view of i. It may be negative.

    Args:
        z0, z1: Embeddings of the two views, (B, D) each with B >= 2, row i of both from the same sample. float64,
            float32, float16 or bfloat16, any strides. Under autocast they may differ in dtype; the wider one is used.
        temperature: > 0, a float or a tensor of one element, which gets its gradient.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12).
        reduction: "mean" over the 2B rows, "sum", or "none".
        row_weights: (2B,) floating, or None, the rows of z0 first. "none" and "sum" take weight · loss, "mean"
            divides their sum by that of the weights. (The paper's DCLW weights the positive's logit alone.)
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (2B,) for "none", the rows of z0 first.

    Raises:
        TypeError: z0 or z1 is no floating tensor, or their dtypes differ outside autocast.
        ValueError: Shapes that do not fit, fewer than 2 samples (nothing would be left to sum), mixed devices,
            temperature not > 0, an unknown reduction or backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Yeh et al., arXiv:2110.06848.
    """
    z0, z1 = checked_rows(OP, 2, z0=z0, z1=z1)
    check_least_rows(OP, "z0", z0, 2, "so that a negative is left")
    check_scalar(OP, "temperature", temperature, z0, positive=True)
    check_reduction(OP, reduction, row_weights, 2 * z0.shape[0], z0)
    return views_loss(
        z0,
        z1,
        inverse_operand(temperature, z0),
        reduction,
        row_weights,
        leaves_partner_out=True,
        normalize=normalize,
        backend=backend,
        caller=OP,
    )


dcl_loss.operation = "contrastive"
dcl_loss.views = 2


class DCLLoss(Loss):
    """`ssl_kernels.dcl_loss` as a module: `DCLLoss(temperature=0.1)(z0, z1)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        normalize, reduction, backend: As in `dcl_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.1,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self, z0: torch.Tensor, z1: torch.Tensor, *, row_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        return dcl_loss(z0, z1, row_weights=row_weights, **self.options)
