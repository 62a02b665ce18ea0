"""Debiased contrastive loss: NT-Xent corrected for negatives that are positives in truth."""

import torch

from ssl_kernels.checks import check_fraction, check_least_rows, check_reduction, check_scalar
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import (
    checked_rows,
    infinite_as_nan,
    inverse,
    inverse_operand,
    logarithm,
    minus_log_sigmoid,
    native_row_losses,
    number_operand,
    reduce,
    stacked,
    takes_row_losses,
)
from ssl_kernels.losses._softmax import is_one_node, one_node, samples, sums_of_views

OP = "debiased_nt_xent_loss"


def debiased_nt_xent_loss(
    z0: torch.Tensor,
    z1: torch.Tensor,
    temperature: float | torch.Tensor = 0.5,
    *,
    positive_prior: float = 0.1,
    normalize: bool = True,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Debiased contrastive loss: NT-Xent whose negatives are freed of the positives drawn among them.

        loss_i = −log( exp(s_i,p(i)) / (exp(s_i,p(i)) + G_i) ),  s_ij = <z_i, z_j> / temperature,
        G_i = max( (Σ_j exp(s_ij) − K τ exp(s_i,p(i))) / (1 − τ),  K exp(−1 / temperature) )

    over the K = 2B − 2 views j of other samples, with τ the share of samples that are of i's own (hidden) class.
    With τ = 0 it is NT-Xent. The lower bound is that of unit rows.

    Args:
        z0, z1: Embeddings of the two views, (B, D) each with B >= 2, row i of both from the same sample. float64,
            float32, float16 or bfloat16, any strides. Under autocast they may differ in dtype; the wider one is used.
        temperature: > 0, a float or a tensor of one element, which gets its gradient.
        positive_prior: τ above, in [0, 1).
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12).
        reduction: "mean" over the 2B rows, "sum", or "none".
        row_weights: (2B,) floating, or None, the rows of z0 first. "none" and "sum" take weight · loss, "mean"
            divides their sum by that of the weights.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (2B,) for "none", the rows of z0 first.

    Raises:
        TypeError: z0 or z1 is no floating tensor, or their dtypes differ outside autocast.
        ValueError: Shapes that do not fit, fewer than 2 samples, mixed devices, temperature not > 0, positive_prior
            outside [0, 1), an unknown reduction or backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Chuang et al., arXiv:2007.00224, with one positive per row.
    """
    z0, z1 = checked_rows(OP, 2, z0=z0, z1=z1)
    check_least_rows(OP, "z0", z0, 2, "so that a negative is left")
    check_scalar(OP, "temperature", temperature, z0, positive=True)
    check_fraction(OP, "positive_prior", positive_prior, below_one=True)
    check_reduction(OP, reduction, row_weights, 2 * z0.shape[0], z0)
    if is_one_node(backend, OP, reduction, row_weights, z0, z1, temperature, views=2):
        rule = {"positive_prior": float(positive_prior), "are_views": True, "leaves_partner_out": True}
        scale = inverse_operand(temperature, z0)
        return one_node(z0, z1, scale, **rule, normalize=normalize, reduction=reduction)[0]
    views = stacked(z0, z1)
    scale = inverse(temperature, views)
    options = {"normalize": normalize, "backend": backend, "caller": OP}
    lse, positive = sums_of_views(views, scale, samples(views), **options)

    # log G, all in logarithms: Σ − K τ exp(s) = Σ (1 − exp(excess)), which must be positive to have one.
    negatives = views.shape[0] - 2
    prior = number_operand(positive_prior, views)
    constants = [logarithm(number, views) for number in (negatives, negatives * prior, 1 - prior)]
    if takes_row_losses(backend, OP, views, lse):
        inputs = (lse, positive, scale)
        return native_row_losses("debiased", inputs, reduction, views, row_weights, constants)
    lse, positive = infinite_as_nan(lse), infinite_as_nan(positive)
    least = constants[0] - scale.double()
    excess = constants[1] + positive - lse
    no_correction = excess >= 0  # false for NaN, which stays
    corrected = lse + torch.log(-torch.expm1(excess.masked_fill(no_correction, -1))) - constants[2]
    log_negatives = torch.maximum(corrected, least).where(~no_correction, least)
    return reduce(minus_log_sigmoid(positive - log_negatives), reduction, views, row_weights)


debiased_nt_xent_loss.operation = "contrastive"
debiased_nt_xent_loss.views = 2


class DebiasedNTXentLoss(Loss):
    """`ssl_kernels.debiased_nt_xent_loss` as a module: `DebiasedNTXentLoss(positive_prior=0.1)(z0, z1)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        positive_prior, normalize, reduction, backend: As in `debiased_nt_xent_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.5,
        *,
        positive_prior: float = 0.1,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self, z0: torch.Tensor, z1: torch.Tensor, *, row_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        return debiased_nt_xent_loss(z0, z1, row_weights=row_weights, **self.options)
