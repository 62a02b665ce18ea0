"""Semi-hard triplets: for each pair of one label the nearest negative that is farther away than the positive.

Distances are made for a block of rows at a time, in forward and again in backward. The gradient of a block comes
from its matrix of coefficients by two products, whatever the number of triplets.
"""

import torch

from ssl_kernels.chunked.rows import LOGITS_PER_BLOCK, input_gradient, unit_rows
from ssl_kernels.ops.library import accumulation_dtype, refuse_torch_func, savable


def semi_hard_losses(embeddings, labels, margin, distance, normalize, chosen):
    """Sum of the losses of each anchor's triplets, (N,) float64, and how many triplets there are.

    Args:
        embeddings, labels: (N, D) and (N,) int64.
        margin: A number, a tensor of one element, or "soft".
        distance: "euclidean" or "cosine".
        normalize: L2-normalise the rows first.
        chosen: The backend: the reference keeps all distances, and differentiates twice.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        if chosen == "reference":
            x, _ = unit_rows(embeddings, normalize)
            gaps, there = _gaps(_differentiable_distances(x, distance), labels, slice(0, len(x)))
            losses = _losses(gaps.double(), there, margin)[0].sum(1)
            return losses, there.sum()
        refuse_torch_func("triplet_loss", chosen)
        soft = isinstance(margin, str)
        if not isinstance(margin, torch.Tensor):
            margin = embeddings.new_full((), 0.0 if soft else margin, dtype=accumulation_dtype(embeddings))
        return _SemiHard.apply(embeddings, labels, margin, soft, distance, normalize)


class _SemiHard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, labels, margin, soft, distance, normalize):
        x, _ = unit_rows(embeddings, normalize)
        losses = x.new_empty(len(x), dtype=torch.float64)
        count = labels.new_zeros(())
        for block in _blocks(x):
            gaps, there = _gaps(_distances(x, block, distance), labels, block)
            losses[block] = _losses(gaps.double(), there, "soft" if soft else margin)[0].sum(1)
            count = count + there.sum()
        ctx.save_for_backward(*map(savable, (embeddings, labels, margin)))
        ctx.options = soft, distance, normalize
        ctx.mark_non_differentiable(count)
        return losses, count

    @staticmethod
    def backward(ctx, grad, _):
        if torch.is_grad_enabled():
            return (*_Raises.apply(grad, *ctx.saved_tensors, *ctx.options), *[None] * 3)
        return (*_gradients(grad, *ctx.saved_tensors, *ctx.options), *[None] * 3)


class _Raises(torch.autograd.Function):
    """Gradients in a graph of their own, so that differentiating them again is an error."""

    @staticmethod
    def forward(ctx, *args):
        return _gradients(*args)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError('triplet_loss: "semi_hard" has no second derivative; backend="reference" has one')


def _gradients(grad, embeddings, labels, margin, soft, distance, normalize):
    """By the embeddings, none for labels, by the margin."""
    with torch.autocast(embeddings.device.type, enabled=False):
        return _gradients_without_autocast(grad, embeddings, labels, margin, soft, distance, normalize)


def _gradients_without_autocast(grad, embeddings, labels, margin, soft, distance, normalize):
    x, rnorm = unit_rows(embeddings, normalize)
    grad_x = torch.zeros_like(x)
    grad_margin = grad.new_zeros(())
    for block in _blocks(x):
        distances = _distances(x, block, distance)
        gaps, there, chosen = _gaps(distances, labels, block, with_choice=True)
        weights = _losses(gaps.double(), there, "soft" if soft else margin)[1] * grad[block, None]
        grad_margin = grad_margin + weights.sum()
        weights = weights.to(x.dtype)
        # By the distances: weights of the positives, less those of the negatives that they chose.
        rows = torch.arange(len(weights), device=x.device)[:, None].expand_as(chosen)
        coefficients = weights.clone()
        # index_put_ sorts on CUDA where scatter_add_ would use atomics.
        coefficients.index_put_((rows, chosen), -weights, accumulate=True)
        if distance == "cosine":
            grad_x[block] -= coefficients @ x
            grad_x -= coefficients.T @ x[block]
        else:
            coefficients = (coefficients / distances).masked_fill(distances == 0, 0)
            grad_x[block] += coefficients.sum(1, keepdim=True) * x[block] - coefficients @ x
            grad_x += coefficients.sum(0)[:, None] * x - coefficients.T @ x[block]
    grad_margin = grad_margin.to(margin.dtype).reshape(margin.shape)
    return input_gradient(grad_x, x, rnorm).to(embeddings.dtype), None, None if soft else grad_margin


def _blocks(x):
    size = max(1, LOGITS_PER_BLOCK // len(x))
    return [slice(start, min(start + size, len(x))) for start in range(0, len(x), size)]


def _distances(x, block, distance):
    """(block, N)."""
    if distance == "cosine":
        return 1 - x[block] @ x.T
    return torch.cdist(x[block], x, compute_mode="donot_use_mm_for_euclid_dist")


def _differentiable_distances(x, distance):
    """(N, N), differentiable twice also at 0, where the gradient is 0."""
    if distance == "cosine":
        return 1 - x @ x.T
    squares = (x[:, None] - x).square().sum(2)
    zero = squares == 0
    return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _gaps(distances, labels, block, with_choice=False):
    """d(i, p) − d(i, n) of row i and column p, with n the semi-hard negative, and where there is such a triplet."""
    n = len(labels)
    same = labels[block, None] == labels
    other = ~same
    itself = torch.arange(n, device=labels.device)[block, None] == torch.arange(n, device=labels.device)
    with torch.no_grad():
        ordered, order = distances.masked_fill(same, torch.inf).sort(dim=1)
        negatives = other.sum(1, keepdim=True)
        place = torch.searchsorted(ordered, distances.contiguous(), right=True)
        chosen = order.gather(1, torch.minimum(place, negatives - 1).clamp_min(0))
        there = same & ~itself & (negatives > 0)
    gaps = (distances - distances.gather(1, chosen)).where(there, 0)
    return (gaps, there, chosen) if with_choice else (gaps, there)


def _losses(gaps, there, margin):
    """Loss of each triplet and its derivative by the gap, 0 where there is none."""
    if isinstance(margin, str):
        losses, slopes = -torch.nn.functional.logsigmoid(-gaps), gaps.sigmoid()
    else:
        losses = torch.relu(gaps + margin)
        slopes = (losses > 0).to(losses.dtype)
    return losses.where(there, 0), slopes.where(there, 0)
