"""Cross-entropy of views of a sample against a teacher's softmax where both are given as logits."""

import torch

from ssl_kernels.chunked.view_cross_entropy import probabilities_of
from ssl_kernels.losses._shared import not_below_zero
from ssl_kernels.ops.library import savable
from ssl_kernels.ops.view_cross_entropy import view_cross_entropy


def swapped_logits(student, scale, teacher, steepness, bias, pairs, weights, *, caller, chosen):
    """Mean over the pairs of the cross-entropies of samples, (N,) float64, or their sum by weights.

    Args:
        student, scale, teacher, steepness, bias, pairs: As in `view_cross_entropy`.
        weights: (N,) float64, or None.
        caller, chosen: Named in error messages, and the backend.
    """
    if chosen == "reference":
        codes = [probabilities_of(logits, steepness, bias) for logits in teacher]
        losses = -sum(
            (codes[a] * torch.log_softmax(scale * savable(student[v].to(scale.dtype)), 1)).sum(1).double()
            for a, v in pairs
        )
    else:
        losses = view_cross_entropy(
            student, scale, teacher, steepness, bias, pairs, caller=caller, chosen=chosen
        )
    losses = not_below_zero(losses / len(pairs))
    return losses if weights is None else (losses * weights).sum()
