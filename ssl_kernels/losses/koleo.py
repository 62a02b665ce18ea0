"""KoLeo: each row's nearest neighbour far away."""

import torch

from ssl_kernels.backends import choose_backend
from ssl_kernels.checks import check_embeddings, check_least_rows, check_reduction
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._rows import row_pairs_loss
from ssl_kernels.ops.batch_hard import batch_hard

OP = "koleo_loss"
EPSILON = 1e-8


def koleo_loss(
    embeddings: torch.Tensor, *, normalize: bool = True, reduction: str = "mean", backend: str | None = None
) -> torch.Tensor:
    """KoLeo regularizer: minus the logarithm of the distance to the nearest other row, which spreads rows evenly.

        loss_i = −log( ‖x̂_i − x̂_n(i)‖₂ + 1e-8 ),  n(i) = argmin_{j ≠ i} ‖x̂_i − x̂_j‖₂

    The nearest rows come from one streamed pass over the pairs, `batch_hard` with a label per row, and get no gradient
    through the choice; the distances are then computed from the rows.

    Args:
        embeddings: (N, D) with N >= 2, float64, float32, float16 or bfloat16, any strides. Gradients flow to both rows
            of a pair; at distance 0 the gradient is 0.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12).
        reduction: "mean" over the N rows, "sum", or "none".
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none".

    Raises:
        TypeError: embeddings is no floating tensor.
        ValueError: Fewer than 2 rows, an unknown reduction or backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Sablayrolles et al., Spreading vectors for similarity search, arXiv:1806.03198, eq. 4; Oquab et al.,
    DINOv2, arXiv:2304.07193, whose epsilon this is.
    """
    check_embeddings(OP, embeddings=embeddings)
    check_least_rows(OP, "embeddings", embeddings, 2, "so that there is a neighbour")
    check_reduction(OP, reduction)
    labels = torch.arange(embeddings.shape[0], device=embeddings.device)
    chosen = choose_backend("batch_hard", backend, OP, embeddings, labels)
    _, nearest = batch_hard(embeddings, labels, normalize=normalize, backend=chosen, caller=OP)
    # Where a row holds a NaN, no row may be nearest: −1, its own distance, which is then NaN as well.
    options = {"normalize": normalize, "measure": "distance", "reduction": reduction, "backend": backend}
    return row_pairs_loss(embeddings, nearest, rule="logarithm", constant=EPSILON, **options, caller=OP)


koleo_loss.operation = "batch_hard"


class KoLeoLoss(Loss):
    """`ssl_kernels.koleo_loss` as a module: `KoLeoLoss()(embeddings)`.

    Args:
        normalize, reduction, backend: As in `koleo_loss`.
    """

    def __init__(
        self, *, normalize: bool = True, reduction: str = "mean", backend: str | None = None
    ) -> None:
        super().__init__(locals())

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return koleo_loss(embeddings, **self.options)
