"""Triplet loss that finds the hardest triplets of the batch."""

import torch
import torch.nn.functional as F

from ssl_kernels.backends import choose_backend
from ssl_kernels.checks import (
    check_choice,
    check_embeddings,
    check_margin,
    check_reduction,
    values_are_readable,
)
from ssl_kernels.chunked.rows import input_gradient, unit_rows
from ssl_kernels.losses._labels import as_ids
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._semi_hard import semi_hard_losses
from ssl_kernels.losses._shared import as_operand, as_scalar, minus_log_sigmoid, reduce
from ssl_kernels.ops.batch_hard import DISTANCES, batch_hard
from ssl_kernels.ops.library import accumulation_dtype, refuse_torch_func

MININGS = ("batch_hard", "semi_hard")
SOFT = "soft"


def triplet_loss(
    embeddings: torch.Tensor,
    labels: torch.Tensor,
    margin: float | torch.Tensor | str = 0.2,
    *,
    mining: str = "batch_hard",
    distance: str = "euclidean",
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """Triplet loss that mines the batch: a row of an anchor's label nearer than one of another label, by a margin.

        loss_i = max(0, margin + max_{j ≠ i, label_j = label_i} d(x_i, x_j) − min_{label_j ≠ label_i} d(x_i, x_j))

    with d(a, b) = ‖a − b‖₂ or, for "cosine", 1 − <a, b>: "batch_hard", the farthest row of the anchor's label and the
    nearest of another. "semi_hard" takes every pair (i, p) of one label, and of the rows of other labels the nearest
    that is farther from i than p; where there is none, the farthest of them. Every row is an anchor; one that has no
    other row of its label, or none of another, has loss 0 and counts nothing in the mean. Where no anchor has both, the
    loss is 0 and so is its gradient. The hardest triplets come from one streamed pass over the pairs, which compares
    distances to within rounding (docs/batch_hard.md); the distances in the loss are then computed from the rows.

    Args:
        embeddings: (N, D), float64, float32, float16 or bfloat16, any strides. Gradients flow to all three rows of a
            triplet; at distance 0 the gradient of the distance is 0.
        labels: (N,) or (N, 1) integers of any dtype and value, or bool.
        margin: >= 0, a float or a tensor of one element, which gets its gradient; or "soft": log(1 + exp(d(i, p) −
            d(i, n))) in place of max(0, margin + ...).
        mining: "batch_hard" or "semi_hard", whose mean and sum are a native kernel on the CPU; else torch computes it
            in blocks of rows, on every backend.
        distance: "euclidean" or "cosine".
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12). False with "cosine" takes inner
            products as they are.
        reduction: "mean" over the anchors that have a positive and a negative, "sum", or "none"; of "semi_hard" over
            the triplets, where "none" gives for each anchor the sum of those it has.
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
    labels = as_ids(op, "labels", labels, (embeddings.shape[0],), embeddings)
    if not (isinstance(margin, str) and margin == SOFT):
        check_margin(op, margin, embeddings)
    check_choice(op, "mining", mining, *MININGS)
    check_choice(op, "distance", distance, *DISTANCES)
    check_reduction(op, reduction)
    chosen = choose_backend("batch_hard", backend, op, embeddings, labels)
    summed = reduction != "none"
    is_native = chosen == "native" and values_are_readable(embeddings, labels, *_tensors(margin))
    if is_native and (summed or mining == "batch_hard"):
        soft = isinstance(margin, str)
        by = as_scalar(margin, embeddings) if _tensors(margin) else _number(0.0 if soft else margin)
        node = torch.ops.ssl_kernels.triplet_loss
        run = node.native if mining == "batch_hard" else node.semi_hard
        return run(embeddings, labels, by, soft, normalize, distance, reduction)
    if mining == "semi_hard":
        losses, triplets = semi_hard_losses(
            embeddings, labels, margin, distance, normalize, chosen, summed=summed
        )
        if reduction == "mean":
            return (losses / triplets.clamp_min(1)).to(accumulation_dtype(embeddings))
        return reduce(losses, reduction, embeddings)
    indices = batch_hard(
        embeddings,
        labels,
        normalize=normalize,
        distance=distance,
        backend=chosen,
        caller=op,
    )
    hardest = torch.stack(indices)  # (2, N)
    complete = (hardest >= 0).all(0)
    if chosen == "reference":
        gaps = _gap(embeddings, _index(hardest, complete), normalize, distance).double()
        gaps = gaps.where(complete, -torch.inf)
    else:
        refuse_torch_func(op, chosen)
        gaps = _Gap.apply(embeddings, hardest, complete, normalize, distance)
    losses = hinge(gaps, margin, embeddings)
    if reduction == "mean":
        return (losses.sum() / complete.sum().clamp_min(1)).to(accumulation_dtype(embeddings))
    return reduce(losses, reduction, embeddings)


triplet_loss.operation = "batch_hard"


def _tensors(margin):
    return [margin] if isinstance(margin, torch.Tensor) else []


def _number(margin):
    return torch.scalar_tensor(float(margin), dtype=torch.float64, device="cpu")


def hinge(gaps, margin, embeddings):
    if isinstance(margin, str):
        return minus_log_sigmoid(-gaps)
    return torch.relu(gaps + as_operand(margin, embeddings))


class _Gap(torch.autograd.Function):
    """d(x_i, x_p) − d(x_i, x_n) of each anchor, float64, −inf where there is no triplet.

    In small batches most of the time would go into autograd's steps from one operator to the next: here the gradient
    is one. Its second derivative is that of the same formula under autograd.
    """

    @staticmethod
    def forward(ctx, embeddings, hardest, complete, normalize, distance):
        index = _index(hardest, complete)
        x, rnorm = unit_rows(embeddings, normalize)
        towards = F.embedding(index, x)  # (2, N, D)
        if distance == "cosine":
            lengths = x.new_empty(0)
            towards = towards[1] - towards[0]
            gap = (x * towards).sum(1)
        else:
            towards = x - towards
            lengths = torch.linalg.vector_norm(towards, dim=2)  # (2, N)
            gap = lengths[0] - lengths[1]
        ctx.save_for_backward(embeddings, index, complete, x, rnorm, towards, lengths)
        ctx.options = normalize, distance
        # Not in place: torch 2.11 compiled loses the gradient of what an in-place operator returns.
        return gap.double().masked_fill(~complete, -torch.inf)

    @staticmethod
    def backward(ctx, grad):
        embeddings, index, complete, x, rnorm, towards, lengths = ctx.saved_tensors
        grad = grad.to(x.dtype)
        if torch.is_grad_enabled():
            gap = _gap(embeddings, index, *ctx.options)
            (grad,) = torch.autograd.grad(gap, embeddings, grad.where(complete, 0), create_graph=True)
            return grad, *[None] * 4
        if ctx.options[1] == "cosine":
            to_others = torch.stack((-grad, grad))[:, :, None] * x
            to_anchors = grad[:, None] * towards
        else:
            weights = torch.stack((grad, -grad)).div_(lengths).masked_fill_(lengths == 0, 0)
            to_others = weights[:, :, None] * -towards
            to_anchors = -to_others.sum(0)
        # As the gradient of F.embedding: summed in one order, as index_add_ is not.
        gathered = torch.ops.aten.embedding_dense_backward(to_others, index, x.shape[0], -1, False)
        return input_gradient(gathered.add_(to_anchors), x, rnorm).to(embeddings.dtype), *[None] * 4


def _index(hardest, complete):
    """`hardest`, but where there is no triplet, the row itself twice: distances of 0, whatever the other rows hold."""
    return hardest.where(complete, torch.arange(hardest.shape[1], device=hardest.device))


def _gap(embeddings, index, normalize, distance):
    """What `_Gap` computes, by operators that differentiate twice."""
    x, _ = unit_rows(embeddings, normalize)
    others = F.embedding(index, x)
    if distance == "cosine":
        return (x * (others[1] - others[0])).sum(1)
    squares = (x - others).square().sum(2)
    zero = squares == 0  # derivatives of 0 there; the second one of vector_norm is NaN
    to_positive, to_negative = squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
    return to_positive - to_negative


class TripletLoss(Loss):
    """`ssl_kernels.triplet_loss` as a module: `TripletLoss(margin=0.2)(embeddings, labels)`.

    Args:
        margin: >= 0, a float, a tensor of one element, an `nn.Parameter` to learn it, or "soft".
        mining, distance, normalize, reduction, backend: As in `triplet_loss`.
    """

    def __init__(
        self,
        margin: float | torch.Tensor | str = 0.2,
        *,
        mining: str = "batch_hard",
        distance: str = "euclidean",
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return triplet_loss(embeddings, labels, **self.options)
