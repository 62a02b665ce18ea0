"""Triplet loss that finds the hardest triplets of the batch."""

import torch
import torch.nn.functional as F

from ssl_kernels.checks import check_embeddings, check_ids, check_reduction, check_scalar
from ssl_kernels.losses._shared import reduce, unit_rows
from ssl_kernels.ops.batch_hard import DISTANCES, batch_hard
from ssl_kernels.ops.library import accumulation_dtype

MININGS = ("batch_hard",)


def triplet_loss(
    embeddings,
    labels,
    margin=0.2,
    *,
    mining="batch_hard",
    distance="euclidean",
    normalize=True,
    reduction="mean",
    backend=None,
):
    """Batch-hard triplet loss: the farthest row of an anchor's label nearer than the nearest of another, by a margin.

        loss_i = max(0, margin + max_{j ≠ i, label_j = label_i} d(x_i, x_j) − min_{label_j ≠ label_i} d(x_i, x_j))

    with d(a, b) = ‖a − b‖₂ or, for "cosine", 1 − <a, b>. Every row is an anchor; one that has no other row of its
    label, or none of another, has loss 0 and counts nothing in the mean. Where no anchor has both, the loss is 0 and so
    is its gradient. The triplets come from one streamed pass over the pairs, which compares distances to within
    rounding (docs/batch_hard.md); the distances in the loss are then computed from the rows.

    Args:
        embeddings: (N, D), float64, float32, float16 or bfloat16, any strides. Gradients flow to all three rows of a
            triplet; at distance 0 the gradient of the distance is 0.
        labels: (N,) integers, any values.
        margin: >= 0, a float or a 0-d tensor, which gets its gradient.
        mining: "batch_hard".
        distance: "euclidean" or "cosine".
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12). False with "cosine" takes inner
            products as they are.
        reduction: "mean" over the anchors that have a positive and a negative, "sum", or "none".
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none".

    Raises:
        TypeError: embeddings is no floating tensor, labels no integer tensor, margin no number.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, a negative margin, an unknown mining,
            distance, reduction or backend, or a backend that cannot run this call.

    Source: Hermans et al., In Defense of the Triplet Loss, arXiv:1703.07737, eq. 5.
    """
    op = "triplet_loss"
    check_embeddings(op, embeddings=embeddings)
    check_ids(op, "labels", labels, (len(embeddings),), embeddings)
    check_scalar(op, "margin", margin, embeddings, positive=False)
    if not isinstance(margin, torch.Tensor) and margin < 0:
        raise ValueError(f"{op}: margin must be >= 0, got {margin}")
    if mining not in MININGS:
        raise ValueError(f'{op}: mining must be "batch_hard", got {mining!r}')
    if distance not in DISTANCES:
        raise ValueError(f'{op}: distance must be "euclidean" or "cosine", got {distance!r}')
    check_reduction(op, reduction)
    indices = batch_hard(
        embeddings,
        labels.to(torch.int64),
        normalize=normalize,
        distance=distance,
        backend=backend,
        caller=op,
    )
    hardest = torch.stack(indices)  # (2, N)
    complete = (hardest >= 0).all(0)
    # Where there is no triplet, the row itself twice: distances of 0, whatever the other rows hold.
    itself = torch.arange(len(embeddings), device=embeddings.device)
    x = unit_rows(embeddings, normalize)
    # (2, N, D). The gradient of F.embedding is summed in one order; that of x[index] is not.
    others = F.embedding(hardest.where(complete, itself), x)
    if distance == "cosine":
        gap = (x * (others[1] - others[0])).sum(1)
    else:
        to_positive, to_negative = _lengths(x - others).unbind()
        gap = to_positive - to_negative
    losses = torch.relu(gap.double() + margin).where(complete, 0)
    if reduction == "mean":
        return (losses.sum() / complete.sum().clamp_min(1)).to(accumulation_dtype(x))
    return reduce(losses, reduction, x)


def _lengths(x):
    """Norms along the last dimension, with derivatives of 0 at 0 (the second one of vector_norm is NaN there)."""
    squares = (x * x).sum(-1)
    zero = squares == 0
    return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


triplet_loss.operation = "batch_hard"
