"""Semi-hard triplets: for each pair of one label the nearest negative that is farther away than the positive.

Distances are made for a block of rows at a time. Of a sum of all losses the gradient is made with them, where one is
asked for; of each anchor's loss in backward, from distances that are made again. The gradient of a block comes from its
matrix of coefficients by two products, whatever the number of triplets. On the CPU sums are csrc/cpu/semi_hard.cpp.
"""

import torch

from ssl_kernels.checks import values_are_readable
from ssl_kernels.chunked.rows import input_gradient, unit_rows
from ssl_kernels.losses._shared import as_scalar
from ssl_kernels.ops.library import refuse_torch_func, savable
from ssl_kernels.ops.operation import once

PAIRS_PER_BLOCK = 1 << 20  # 8 MB in float64


def semi_hard_losses(embeddings, labels, margin, distance, normalize, chosen, *, summed):
    """Sum of the losses of each anchor's triplets, (N,) float64, and how many triplets there are.

    Args:
        embeddings, labels: (N, D) and (N,) int64.
        margin: A number, a tensor of one element, or "soft".
        distance: "euclidean" or "cosine".
        normalize: L2-normalise the rows first.
        chosen: The backend: the reference keeps all distances, and differentiates twice.
        summed: Over the anchors too, to a scalar.
    """
    with torch.autocast(embeddings.device.type, enabled=False):
        if chosen == "reference":
            x, _ = unit_rows(embeddings, normalize)
            everything = slice(0, x.shape[0])
            gaps, there, _ = _gaps(
                _differentiable_distances(x, distance), labels, _grouped(labels), everything
            )
            losses = _losses(gaps.double(), there, margin)[0].sum(1)
            return losses.sum() if summed else losses, there.sum()
        refuse_torch_func("triplet_loss", chosen)
        soft = isinstance(margin, str)
        by = as_scalar(0.0 if soft else margin, embeddings)
        return _SemiHard.apply(embeddings, labels, by, soft, distance, normalize, summed, chosen)


class _SemiHard(torch.autograd.Function):
    @staticmethod
    def forward(ctx, embeddings, labels, margin, soft, distance, normalize, summed, chosen):
        args = embeddings, labels, margin, soft, distance, normalize
        with_gradients = summed and (ctx.needs_input_grad[0] or ctx.needs_input_grad[2])
        one = (
            embeddings.new_ones((), dtype=torch.float64).expand(embeddings.shape[0])
            if with_gradients
            else None
        )
        losses, count, *gradients = _stream(one, *args)
        ctx.save_for_backward(*map(savable, (embeddings, labels, margin)), *gradients)
        ctx.options, ctx.chosen = (soft, distance, normalize), chosen
        ctx.mark_non_differentiable(count)
        return losses.sum() if summed else losses, count

    @staticmethod
    def backward(ctx, grad, _):
        embeddings, labels, margin, *of_sum = ctx.saved_tensors

        def make(grad):
            if of_sum:
                by_x, by_margin = (each * grad for each in of_sum)
            else:
                _, _, by_x, by_margin = _stream(
                    grad.expand(embeddings.shape[0]), embeddings, labels, margin, *ctx.options
                )
            return by_x.to(embeddings.dtype), by_margin.to(margin.dtype).reshape(margin.shape)

        needs = True, not ctx.options[0]
        by_x, by_margin = once("triplet_loss", ctx.chosen, needs, make, (grad,), embeddings, margin)
        return by_x, None, by_margin, *[None] * 5


def _stream(grad, embeddings, labels, margin, soft, distance, normalize):
    """[losses, triplets], and with grad, that of each anchor's loss, the gradients by the rows, in the accumulation
    dtype, and by the margin."""
    with torch.autocast(embeddings.device.type, enabled=False):
        x, rnorm = unit_rows(embeddings, normalize)
        losses = x.new_empty(x.shape[0], dtype=torch.float64)
        count = labels.new_zeros(())
        grad_x, grad_margin = torch.zeros_like(x), losses.new_zeros(())
        groups = _grouped(labels)
        for block in _blocks(x):
            distances = _distances(x, block, distance)
            gaps, there, pairs = _gaps(distances, labels, groups, block)
            values, slopes = _losses(gaps.double(), there, "soft" if soft else margin)
            losses[block] = values.sum(1)
            count = count + there.sum()
            if grad is not None:
                slopes = slopes * grad[block, None]
                grad_margin = grad_margin + slopes.sum()
                _add_gradient(grad_x, x, block, distances, distance, pairs, slopes.to(x.dtype))
        if grad is None:
            return [losses, count]
        return [losses, count, input_gradient(grad_x, x, rnorm), grad_margin]


def _add_gradient(grad_x, x, block, distances, distance, pairs, slopes):
    """By the distances: slopes of the positives, less those of the negatives that they chose."""
    coefficients = torch.zeros_like(distances)
    for columns, values in zip(pairs, (slopes, -slopes), strict=True):
        if x.is_cpu:
            coefficients.scatter_add_(1, columns, values)
        else:  # index_put_ sorts where scatter_add_ would use atomics
            rows = torch.arange(columns.shape[0], device=x.device)[:, None].expand_as(columns)
            coefficients.index_put_((rows, columns), values, accumulate=True)
    if distance == "cosine":
        grad_x[block] -= coefficients @ x
        grad_x -= coefficients.T @ x[block]
    else:
        coefficients = (coefficients / distances).masked_fill(distances == 0, 0)
        grad_x[block] += coefficients.sum(1, keepdim=True) * x[block] - coefficients @ x
        grad_x += coefficients.sum(0)[:, None] * x - coefficients.T @ x[block]


def _blocks(x):
    if torch.compiler.is_exporting():  # a program for any number of rows has no number of blocks
        return [slice(None)]
    size = max(1, PAIRS_PER_BLOCK // x.shape[0])
    return [slice(start, min(start + size, x.shape[0])) for start in range(0, x.shape[0], size)]


def _distances(x, block, distance):
    """(block, N)."""
    if distance == "cosine":
        return 1 - x[block] @ x.T
    if x.dtype == torch.float32 and x.is_cpu:
        # In float64 a product is faster than differences in float32, and loses nothing of them. Nearer than that rows
        # are equal, as far as float32 tells them apart.
        wide = x.double()
        lengths = wide.square().sum(1)
        both = lengths[block, None] + lengths
        squares = torch.addmm(both, wide[block], wide.T, alpha=-2)
        return squares.masked_fill(squares < 1e-14 * both, 0).sqrt().float()
    return torch.cdist(x[block], x, compute_mode="donot_use_mm_for_euclid_dist")


def _differentiable_distances(x, distance):
    """(N, N), differentiable twice also at 0, where the gradient is 0."""
    if distance == "cosine":
        return 1 - x @ x.T
    squares = (x[:, None] - x).square().sum(2)
    zero = squares == 0
    return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def _grouped(labels):
    """(labels in order, the rows they belong to, most rows of one label): where it cannot be told, all."""
    ordered, rows = labels.sort(stable=True)
    if not values_are_readable(labels):
        return ordered, rows, labels.shape[0]
    return ordered, rows, int(torch.unique_consecutive(ordered, return_counts=True)[1].max())


def _gaps(distances, labels, groups, block):
    """d(i, p) − d(i, n) of row i of the block and each of the rows p of its label, n the semi-hard negative; where
    there is such a triplet; and the columns of p and n. All (block, most rows of one label)."""
    n, own = labels.shape[0], labels[block, None]
    ordered_labels, rows, most = groups
    first, end = (torch.searchsorted(ordered_labels, own, right=right) for right in (False, True))
    places = torch.arange(most, device=labels.device)
    positive = rows[(first + places).clamp_max(n - 1)]
    negatives = n - (end - first)
    itself = torch.arange(n, device=labels.device)[block, None]
    there = (places < end - first) & (positive != itself) & (negatives > 0)
    to_positive = distances.gather(1, positive)
    with torch.no_grad():
        ordered, order = distances.masked_fill(own == labels, torch.inf).sort(dim=1)
        farther = torch.searchsorted(ordered, to_positive.contiguous(), right=True)
        place = torch.minimum(farther, negatives - 1).clamp_min(0)
        # NaN counts as farthest, but sorting puts it behind the rows of the own label, which stand as inf.
        place = place.masked_fill((ordered.gather(1, place) == torch.inf) & ordered[:, -1:].isnan(), n - 1)
        negative = order.gather(1, place)
    return (to_positive - distances.gather(1, negative)).where(there, 0), there, (positive, negative)


def _losses(gaps, there, margin):
    """Loss of each triplet and its derivative by the gap, 0 where there is none."""
    if isinstance(margin, str):
        losses, slopes = -torch.nn.functional.logsigmoid(-gaps), gaps.sigmoid()
    else:
        losses = torch.relu(gaps + margin)
        slopes = (losses > 0).to(losses.dtype)
    return losses.where(there, 0), slopes.where(there, 0)
