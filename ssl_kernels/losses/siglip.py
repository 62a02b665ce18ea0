"""The pairwise sigmoid loss of SigLIP."""

import torch

from ssl_kernels.checks import check_reduction, check_scalar
from ssl_kernels.losses._labels import checked_duplicates
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import as_scalar, checked_rows, reduce
from ssl_kernels.ops.library import accumulation_dtype
from ssl_kernels.ops.sigmoid_pairs import sigmoid_pairs


def siglip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: float | torch.Tensor,
    logit_bias: float | torch.Tensor,
    *,
    ids: torch.Tensor | None = None,
    image_index: torch.Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """SigLIP: every pair of an image and a text is classified by itself as belonging together or not.

        loss_i = Σ_j softplus(−y_ij (logit_scale · <image_i, text_j> + logit_bias)),  y_ij = +1 for i = j, −1 else

    With "mean" and "sum" the gradient is made in the forward pass, with "none" in the backward.

    With `image_index` an image may have any number of texts: y_ij = +1 for i = image_index_j, −1 else, and the number
    of texts, each of which has one positive pair, takes the place of N.

    Args:
        image_features, text_features: (N, D) each, row i of both of one pair; (N, D) and (M, D) with image_index.
            float64, float32, float16 or bfloat16, any strides. Under autocast they may differ in dtype; the wider one
            is used.
        logit_scale, logit_bias: A finite float or a tensor of one element, which gets its gradient. The factor itself,
            not its logarithm: the paper begins at 10 and −10 and learns log(logit_scale) and logit_bias.
        ids: (N,) or (N, 1) integers or bool, or None. An image and a text of equal ids that are not of one pair, known
            duplicates, are left out: no negatives of each other, and no positives.
        image_index: (M,) integers in [0, N), the image of each text, or None: text i is that of image i. All texts
            of an image are its positives. Not with ids.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12).
        reduction: "mean": the sum over all pairs divided by N, as in the paper, or by M with image_index; "sum", or
            "none".
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none", the sum over the texts for each image; with
        image_index (M,), the sum over the images for each text.

    Raises:
        TypeError: A feature tensor is no floating tensor, or their dtypes differ outside autocast.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, a scale or bias that is not finite, ids with
            image_index, an index outside [0, N), an unknown reduction or backend, or a backend that cannot run this
            call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, arXiv:2303.15343, eq. 1 and algorithm 1.
    """
    op = "siglip_loss"
    paired = 2 if image_index is None else 1
    image_features, text_features = checked_rows(
        op, paired, image_features=image_features, text_features=text_features
    )
    check_scalar(op, "logit_scale", logit_scale, image_features, positive=False)
    check_scalar(op, "logit_bias", logit_bias, image_features, positive=False)
    check_reduction(op, reduction)
    ids, image_index = checked_duplicates(op, ids, image_index, image_features, text_features)
    rows, columns, marks = image_features, text_features, {"row_ids": ids, "column_ids": ids}
    if image_index is not None:
        rows, columns = text_features, image_features
        images = torch.arange(columns.shape[0], device=columns.device)
        marks = {"row_ids": image_index, "column_ids": images, "equal_ids_are_positive": True}
    losses = sigmoid_pairs(
        rows,
        columns,
        as_scalar(logit_scale, image_features),
        as_scalar(logit_bias, image_features),
        **marks,
        normalize_rows=normalize,
        normalize_columns=normalize,
        total=reduction != "none",
        backend=backend,
        caller=op,
    )
    if reduction == "none":
        return reduce(losses, reduction, rows)
    pairs = rows.shape[0] if reduction == "mean" else 1
    return (losses / pairs).to(accumulation_dtype(image_features))


siglip_loss.operation = "sigmoid_pairs"


class SigLIPLoss(Loss):
    """`ssl_kernels.siglip_loss` as a module: `SigLIPLoss(scale, bias)(image_features, text_features)`.

    What is given at the call, `SigLIPLoss()(image_features, text_features, scale, bias)`, goes before the module's own.

    Args:
        logit_scale, logit_bias: A float, a tensor of one element, or an `nn.Parameter` to learn it. The paper learns
            the logarithm of the scale: give its exponential at the call for that.
        normalize, reduction, backend: As in `siglip_loss`.
    """

    def __init__(
        self,
        logit_scale: float | torch.Tensor = 10.0,
        logit_bias: float | torch.Tensor = -10.0,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: float | torch.Tensor | None = None,
        logit_bias: float | torch.Tensor | None = None,
        *,
        ids: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        options = self.options_with(logit_scale=logit_scale, logit_bias=logit_bias)
        return siglip_loss(image_features, text_features, ids=ids, image_index=image_index, **options)
