"""Uniformity: how evenly embeddings lie on the sphere."""

import torch

from ssl_kernels.checks import check_embeddings, check_least_rows, check_scalar
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import as_scalar, logarithm, number_operand, takes_row_losses
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import accumulation_dtype

OP = "uniformity_loss"


def uniformity_loss(
    embeddings: torch.Tensor,
    t: float | torch.Tensor = 2.0,
    *,
    normalize: bool = True,
    backend: str | None = None,
) -> torch.Tensor:
    """Logarithm of the mean Gaussian potential of all pairs of rows, least where they lie evenly on the sphere.

        loss = log( 1 / (N (N − 1)) · Σ_{i ≠ j} exp(−t ‖x̂_i − x̂_j‖²) )

    It is negative, 0 where all rows are one. Of unit rows ‖x̂_i − x̂_j‖² is 2 − 2 <x̂_i, x̂_j>; of rows as they are, the
    squares of their lengths go with the sums as biases.

    Args:
        embeddings: (N, D) with N >= 2, float64, float32, float16 or bfloat16, any strides. Gets its gradient.
        t: > 0, a float or a tensor of one element, which gets its gradient.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12). Without, an infinite entry makes the
            loss NaN.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        A float32 scalar (float64 for float64 input).

    Raises:
        TypeError: embeddings is no floating tensor, or t no number.
        ValueError: Fewer than 2 rows, t not > 0, an unknown backend, or one that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Wang & Isola, arXiv:2005.10242, eq. 3 and figure 5.
    """
    check_embeddings(OP, embeddings=embeddings)
    check_least_rows(OP, "embeddings", embeddings, 2, "so that there is a pair")
    check_scalar(OP, "t", t, embeddings, positive=True)
    is_number = not (isinstance(t, torch.Tensor) or torch.compiler.is_compiling())
    scale = as_scalar(2 * number_operand(t, embeddings), embeddings)
    own = -2 * t if is_number else -scale  # of the squared lengths of both rows of a pair
    if normalize:
        lse = contrastive(embeddings, None, scale, backend=backend, caller=OP).lse
    else:
        bias = 0.5 * own * embeddings.to(scale.dtype).square().sum(1)
        lse = contrastive(
            embeddings, None, scale, column_bias=bias, normalize_rows=False, backend=backend, caller=OP
        ).lse
        lse, own = lse + bias, 0.0
    constant = own - logarithm(embeddings.shape[0] * (embeddings.shape[0] - 1), embeddings)
    if is_number and takes_row_losses(backend, OP, embeddings, lse):
        return torch.ops.ssl_kernels.log_sum_exp.native(lse, constant, embeddings.dtype == torch.float64)
    return (lse.logsumexp(0) + constant).to(accumulation_dtype(embeddings))


uniformity_loss.operation = "contrastive"


class UniformityLoss(Loss):
    """`ssl_kernels.uniformity_loss` as a module: `UniformityLoss(t=2.0)(embeddings)`.

    Args:
        t: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        normalize, backend: As in `uniformity_loss`.
    """

    def __init__(
        self, t: float | torch.Tensor = 2.0, *, normalize: bool = True, backend: str | None = None
    ) -> None:
        super().__init__(locals())

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return uniformity_loss(embeddings, **self.options)
