"""Triplet margin loss of rows that are paired already."""

import torch

from ssl_kernels.checks import check_choice, check_margin, check_reduction
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._rows import row_pairs_loss
from ssl_kernels.losses._shared import checked_rows

OP = "triplet_margin_loss"
DISTANCES = ("euclidean", "cosine")


def triplet_margin_loss(
    anchor: torch.Tensor,
    positive: torch.Tensor,
    negative: torch.Tensor,
    margin: float | torch.Tensor = 0.2,
    *,
    distance: str = "euclidean",
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """Triplet margin loss of given triplets: the positive nearer than the negative by a margin.

        loss_i = max(0, d(anchor_i, positive_i) − d(anchor_i, negative_i) + margin)

    with d(a, b) = ‖a − b‖₂ or, for "cosine", 1 − <a, b> of unit rows. `triplet_loss` finds the triplets itself.

    Args:
        anchor, positive, negative: (N, D) each. float64, float32, float16 or bfloat16, any strides. Under autocast
            they may differ in dtype; the widest is used. All three get their gradient, which at distance 0 is 0.
        margin: >= 0.
        distance: "euclidean" or "cosine".
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12). False with "cosine" takes inner
            products as they are.
        reduction: "mean" over the N triplets, "sum", or "none".
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none".

    Raises:
        TypeError: An argument is no tensor or number of the kind above, or dtypes differ outside autocast.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, a negative margin, an unknown distance,
            reduction or backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Schroff et al., FaceNet, arXiv:1503.03832, with distances instead of their squares as in Hermans et al.,
    arXiv:1703.07737.
    """
    anchor, positive, negative = checked_rows(OP, 3, anchor=anchor, positive=positive, negative=negative)
    check_margin(OP, margin, anchor)
    check_choice(OP, "distance", distance, *DISTANCES)
    check_reduction(OP, reduction)
    options = {
        "constant": margin,
        "rule": "hinge",
        "normalize": normalize,
        "reduction": reduction,
        "backend": backend,
        "caller": OP,
    }
    if distance == "cosine":
        return row_pairs_loss(anchor, negative, positive, measure="product", **options)
    return row_pairs_loss(anchor, positive, negative, measure="distance", **options)


triplet_margin_loss.operation = "row_pairs"


class TripletMarginLoss(Loss):
    """`ssl_kernels.triplet_margin_loss` as a module: `TripletMarginLoss(margin=0.2)(anchor, positive, negative)`.

    Args:
        margin, distance, normalize, reduction, backend: As in `triplet_margin_loss`.
    """

    def __init__(
        self,
        margin: float | torch.Tensor = 0.2,
        *,
        distance: str = "euclidean",
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(self, anchor: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        return triplet_margin_loss(anchor, positive, negative, **self.options)
