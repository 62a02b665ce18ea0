"""Cross-entropy of views of a sample against a teacher's softmax where both are given as logits."""

import torch

from ssl_kernels.chunked.view_cross_entropy import probabilities_of
from ssl_kernels.losses._shared import may_be_one_node, not_below_zero
from ssl_kernels.ops.library import accumulation_dtype, savable
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


def are_one_node(student, teacher, temperatures, row_weights):
    """Whether `one_node` gives the loss of logits: temperatures are numbers, and each sample counts alike."""
    if row_weights is not None or any(isinstance(temperature, torch.Tensor) for temperature in temperatures):
        return False
    wide = student[0].dtype == torch.float64
    return all((view.dtype == torch.float64) == wide for view in teacher) and may_be_one_node(
        *student, *teacher
    )


def one_node(student, teacher, temperature, teacher_temperature, center, pairs, reduction):
    """The reduced loss by `view_loss.native` (csrc/ops/cluster_rows.cpp), of tensors for which `are_one_node`."""
    steepness = 1 / float(teacher_temperature)
    bias = None if center is None else center.to(accumulation_dtype(student[0])) * -steepness
    flat = [number for pair in pairs for number in pair]
    return torch.ops.ssl_kernels.view_loss.native(
        student, teacher, 1 / float(temperature), steepness, bias, flat, reduction == "mean"
    )
