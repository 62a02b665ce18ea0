"""BYOL's regression of unit rows."""

from ssl_kernels.checks import check_embeddings, check_reduction, check_row_weights, check_same_rows
from ssl_kernels.losses._rows import pair_products
from ssl_kernels.losses._shared import reduce, widest_under_autocast

OP = "byol_loss"


def byol_loss(prediction, target, *, normalize=True, reduction="mean", row_weights=None):
    """BYOL's loss: the squared distance of unit rows, 2 − 2 cos(prediction_i, target_i).

    The target gets no gradient. BYOL adds the loss of the two views swapped; so does the caller.

    Args:
        prediction, target: (N, D) each. float64, float32, float16 or bfloat16, any strides. Under autocast they may
            differ in dtype; the wider one is used.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12). False takes 2 − 2 <p, t>.
        reduction: "mean" over the N rows, "sum", or "none".
        row_weights: (N,) floating, or None. "none" and "sum" take weight · loss, "mean" divides their sum by that of
            the weights.

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none".

    Raises:
        TypeError: prediction or target is no floating tensor, or their dtypes differ outside autocast.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, or an unknown reduction.

    Source: Grill et al., BYOL, arXiv:2006.07733, eq. 2.
    """
    prediction, target = widest_under_autocast(prediction, target)
    check_embeddings(OP, prediction=prediction, target=target)
    check_same_rows(OP, prediction=prediction, target=target)
    check_reduction(OP, reduction)
    check_row_weights(OP, "row_weights", row_weights, len(prediction), prediction)
    cosines = pair_products(prediction, target.detach(), normalize)
    return reduce(2 - 2 * cosines, reduction, prediction, row_weights)
