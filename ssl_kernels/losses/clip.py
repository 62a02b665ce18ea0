"""CLIP's loss: both directions from one pass over the logits."""

import torch

from ssl_kernels.checks import check_fraction, check_reduction, check_scalar
from ssl_kernels.losses._labels import checked_duplicates
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._rows import row_dots
from ssl_kernels.losses._shared import (
    as_operand,
    as_scalar,
    checked_rows,
    not_below_zero,
    number_operand,
    reduce,
    rows_for_several,
    unit_rows,
)
from ssl_kernels.losses._softmax import pairs_loss
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import savable

OP = "clip_loss"


def clip_loss(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: float | torch.Tensor,
    *,
    label_smoothing: float = 0.0,
    ids: torch.Tensor | None = None,
    image_index: torch.Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """CLIP's loss: each image against all texts and each text against all images, the mean of both.

        loss_i = ½ (CE_i(s) + CE_i(sᵀ)),  s_ij = logit_scale · <image_i, text_j>

    where CE_i is the cross-entropy of row i with target i, smoothed as `F.cross_entropy` smooths it:
    log Σ_j exp(s_ij) − (1 − ε) s_ii − (ε / N) Σ_j s_ij. The last sum is logit_scale · <image_i, Σ_j text_j>, O(N · D).

    With `image_index` an image may have any number of texts: the pairs are (image_index_j, text j), their number
    takes the place of N, and a pair's loss is ½ (CE of the image with this text as target + CE of the text). The
    mean over the pairs is the cross-entropy of an image with its texts as equal targets, weighted by how many it has.

    Args:
        image_features, text_features: (N, D) each, row i of both a pair; (N, D) and (M, D) with image_index. float64,
            float32, float16 or bfloat16, any strides. Under autocast they may differ in dtype; the wider one is used.
        logit_scale: 1 / temperature, a float or a tensor of one element, which gets its gradient: `log_scale.exp()`, as
            open_clip passes it.
        label_smoothing: ε above, in [0, 1].
        ids: (N,) or (N, 1) integers or bool, or None. Pairs of equal ids are no negatives of each other: known
            duplicates. Not with label_smoothing.
        image_index: (M,) integers in [0, N), the image of each text, or None: text i is that of image i. All texts
            of an image are its positives. Not with ids.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12); rows that are unit already stay.
        reduction: "mean" over the pairs, "sum", or "none".
        row_weights: (N,) floating, a weight per pair, or None. "none" and "sum" take weight · loss, "mean" divides
            their sum by that of the weights.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or a value per pair for "none".

    Raises:
        TypeError: An argument is no tensor or number of the kind above, or dtypes differ outside autocast.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, logit_scale not finite, label_smoothing
            outside [0, 1] or with ids, ids with image_index, an index outside [0, N), an unknown reduction or
            backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Radford et al., CLIP, arXiv:2103.00020, figure 3.
    """
    paired = 2 if image_index is None else 1
    image_features, text_features = checked_rows(
        OP, paired, image_features=image_features, text_features=text_features
    )
    check_scalar(OP, "logit_scale", logit_scale, image_features, positive=False)
    check_fraction(OP, "label_smoothing", label_smoothing)
    n = text_features.shape[0]
    check_reduction(OP, reduction, row_weights, n, image_features)
    ids, image_index = checked_duplicates(OP, ids, image_index, image_features, text_features)
    if ids is not None and label_smoothing:
        raise ValueError(f"{OP}: label_smoothing must be 0 with ids, got {label_smoothing}")
    if label_smoothing:
        image_features, text_features = (
            rows_for_several(rows, backend, OP) for rows in (image_features, text_features)
        )

    if image_index is None and not label_smoothing:
        return pairs_loss(
            image_features,
            text_features,
            as_operand(logit_scale, image_features),
            reduction,
            row_weights,
            row_ids=ids,
            column_ids=ids,
            both_directions=True,
            normalize=normalize,
            backend=backend,
            caller=OP,
        )
    scale = as_scalar(logit_scale, image_features)
    if image_index is not None:
        loss = _with_several_texts(
            image_features, text_features, scale, image_index, label_smoothing, normalize, backend
        )
        return reduce(loss, reduction, image_features, row_weights)
    lse, text_lse, positive = contrastive(
        image_features,
        text_features,
        scale,
        positives=torch.arange(n, device=image_features.device),
        normalize_rows=normalize,
        normalize_columns=normalize,
        both_directions=True,
        backend=backend,
        caller=OP,
    )
    smoothing = number_operand(label_smoothing, image_features)
    loss = (lse + text_lse) / 2 - (1 - smoothing) * positive
    images, texts = unit_rows(image_features, normalize), unit_rows(text_features, normalize)
    means = row_dots(images, texts.mean(0)) + row_dots(texts, images.mean(0))
    loss = not_below_zero(loss - smoothing / 2 * scale * means)
    return reduce(loss, reduction, image_features, row_weights)


clip_loss.operation = "contrastive"


def _with_several_texts(
    image_features, text_features, scale, image_index, label_smoothing, normalize, backend
):
    """A value for each text and its image. Rows are the texts, each of which has one positive."""
    lse, image_lse, positive = contrastive(
        text_features,
        image_features,
        scale,
        positives=image_index,
        normalize_rows=normalize,
        normalize_columns=normalize,
        both_directions=True,
        backend=backend,
        caller=OP,
    )
    image_index = savable(image_index)
    smoothing = number_operand(label_smoothing, image_features)
    loss = (lse + image_lse[image_index]) / 2 - (1 - smoothing) * positive
    if not label_smoothing:
        return loss
    images, texts = unit_rows(image_features, normalize), unit_rows(text_features, normalize)
    means = row_dots(texts, images.mean(0)) + row_dots(images, texts.mean(0))[image_index]
    return not_below_zero(loss - smoothing / 2 * scale * means)


class CLIPLoss(Loss):
    """`ssl_kernels.clip_loss` as a module: `CLIPLoss(scale)(image_features, text_features)`.

    A scale given at the call, `CLIPLoss()(image_features, text_features, logit_scale)`, goes before the module's own.

    Args:
        logit_scale: A float, a tensor of one element, or an `nn.Parameter` to learn it. The paper learns the logarithm
            of the scale: give its exponential at the call for that.
        label_smoothing, normalize, reduction, backend: As in `clip_loss`.
    """

    def __init__(
        self,
        logit_scale: float | torch.Tensor = 1 / 0.07,
        *,
        label_smoothing: float = 0.0,
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
        *,
        ids: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return clip_loss(
            image_features,
            text_features,
            ids=ids,
            image_index=image_index,
            row_weights=row_weights,
            **self.options_with(logit_scale=logit_scale),
        )
