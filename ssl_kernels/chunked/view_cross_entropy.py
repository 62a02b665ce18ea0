"""`view_cross_entropy` in plain PyTorch, one view of the student at a time."""

import torch

from ssl_kernels.chunked.cluster_cross_entropy import summed_codes, teachers_of_views
from ssl_kernels.chunked.rows import without_autocast


def probabilities_of(logits, steepness, bias):
    logits = steepness * logits.to(steepness.dtype)
    return torch.softmax(logits if bias is None else logits + bias, 1)


def _targets(pairs, teacher, steepness, bias):
    """(number of a view of the student, how many teachers it has, the sum of their probabilities), view by view."""
    codes = [probabilities_of(logits, steepness, bias) for logits in teacher]
    sums = {}
    for view, of in teachers_of_views(pairs).items():
        if of not in sums:
            sums[of] = summed_codes(codes, of)
        yield view, len(of), sums[of]


@torch.no_grad()
@without_autocast
def view_cross_entropy_fwd(student, teacher, scale, steepness, bias, pairs):
    losses = 0
    for view, _, target in _targets(pairs, teacher, steepness, bias):
        logarithms = torch.log_softmax(scale * student[view].to(scale.dtype), 1)
        losses = losses - (logarithms * target).sum(1, dtype=torch.float64)
    return losses


@torch.no_grad()
@without_autocast
def view_cross_entropy_bwd(weights, student, teacher, scale, steepness, bias, pairs, needs):
    by_scale = torch.zeros((), dtype=torch.float64, device=scale.device)
    weight = weights.to(scale.dtype)[:, None]
    grads = [
        torch.zeros_like(x, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for x, need in zip(student, needs[:-1], strict=True)
    ]
    for view, count, target in _targets(pairs, teacher, steepness, bias):
        logits = student[view].to(scale.dtype)
        by_logits = torch.softmax(scale * logits, 1)
        if count > 1:
            by_logits.mul_(count)
        by_logits.sub_(target)
        if needs[-1]:
            by_scale = by_scale + (by_logits * logits * weight).sum(dtype=torch.float64)
        if needs[view]:
            grads[view].copy_(by_logits.mul_(weight * scale))
    return [*grads, by_scale.to(scale.dtype)]
