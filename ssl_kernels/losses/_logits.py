"""Cross-entropy of views of a sample against a teacher's softmax where both are given as logits.

Nothing of the size of the logits is kept beside them: backward makes the softmaxes anew, one view at a time.
"""

import torch

from ssl_kernels.losses._shared import not_below_zero
from ssl_kernels.ops.library import all_savable
from ssl_kernels.ops.operation import once


def swapped_logits(student, scale, teacher, steepness, bias, pairs, weights, *, chosen):
    """Mean over the pairs of the cross-entropies of samples, (N,) float64, or their sum by weights.

    Args:
        student: V tensors (N, K).
        scale: 0-d, of the student's logits. Gets its gradient.
        teacher: A tensors (N, K) with the probabilities softmax(steepness · t + bias), without gradient.
        steepness, bias: 0-d, and (K,) or None.
        pairs: (a, v): view v of the student is to have the probabilities of the teacher's view a.
        weights: (N,) float64, or None.
        chosen: The backend.
    """
    if chosen == "reference":
        codes = [_codes(logits, steepness, bias) for logits in teacher]
        losses = -sum(
            (codes[a] * torch.log_softmax(scale * student[v].to(scale.dtype), 1)).sum(1).double()
            for a, v in pairs
        ) / len(pairs)
    else:
        losses = _SwappedLogits.apply(
            tuple(pairs), len(student), chosen, scale, steepness, bias, *student, *teacher
        )
    losses = not_below_zero(losses)
    return losses if weights is None else (losses * weights).sum()


def _codes(logits, steepness, bias):
    logits = steepness * logits.to(steepness.dtype)
    return torch.softmax(logits if bias is None else logits + bias, 1)


def _targets(pairs, teacher, steepness, bias):
    """(number of a view of the student, how many teachers it has, the sum of their probabilities), view by view."""
    codes = [_codes(logits, steepness, bias) for logits in teacher]
    of_view, sums = {}, {}
    for a, v in pairs:
        of_view[v] = (*of_view.get(v, ()), a)
    for view, of in of_view.items():
        if of not in sums:
            sums[of] = codes[of[0]] if len(of) == 1 else torch.stack([codes[a] for a in of]).sum(0)
        yield view, len(of), sums[of]


class _SwappedLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pairs, students, chosen, scale, steepness, bias, *views):
        student, teacher = views[:students], views[students:]
        loss = 0
        with torch.autocast(scale.device.type, enabled=False):
            for view, _, target in _targets(pairs, teacher, steepness, bias):
                probabilities = torch.log_softmax(scale * student[view].to(scale.dtype), 1)
                loss = loss - (probabilities * target).sum(1, dtype=torch.float64)
        ctx.save_for_backward(*all_savable(scale, steepness, bias, *views))
        ctx.pairs, ctx.students, ctx.chosen = pairs, students, chosen
        return loss / len(pairs)

    @staticmethod
    def backward(ctx, grad):
        scale, steepness, bias, *views = ctx.saved_tensors
        student, teacher = views[: ctx.students], views[ctx.students :]
        scale_needs_grad = ctx.needs_input_grad[3]
        needs = ctx.needs_input_grad[6 : 6 + ctx.students]

        def make():
            weight = (grad / len(ctx.pairs)).to(scale.dtype)[:, None]
            scaled = weight * scale
            by_scale = torch.zeros((), dtype=torch.float64, device=scale.device)
            grads = [None if need else each.new_empty(0) for each, need in zip(student, needs, strict=True)]
            with torch.autocast(scale.device.type, enabled=False):
                for view, count, target in _targets(ctx.pairs, teacher, steepness, bias):
                    logits = student[view].to(scale.dtype)
                    by_logits = torch.softmax(scale * logits, 1)
                    if count > 1:
                        by_logits.mul_(count)
                    by_logits.sub_(target)
                    if scale_needs_grad:
                        by_scale = by_scale + (by_logits * logits * weight).sum(dtype=torch.float64)
                    if needs[view]:
                        grads[view] = by_logits.mul_(scaled).to(student[view].dtype)
            grads = [
                torch.zeros_like(x) if made is None else made for x, made in zip(student, grads, strict=True)
            ]
            return by_scale.to(scale.dtype), *grads

        by_scale, *grads = once("dino_loss", ctx.chosen, make, grad, scale, *views)
        grads = [made if need else None for made, need in zip(grads, needs, strict=True)]
        return (
            None,
            None,
            None,
            by_scale if scale_needs_grad else None,
            None,
            None,
            *grads,
            *[None] * len(teacher),
        )
