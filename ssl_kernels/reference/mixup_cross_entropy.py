"""Cross-entropy against mixed targets by its definition; PyTorch's own autograd differentiates it."""

import torch


def mixup_cross_entropy(logits, target, permutation, lam, label_smoothing=0.0):
    """Cross-entropy of each row against λ_i · its target + (1 − λ_i) · its partner's; docs/mixing.md is the contract.

    Args:
        logits: (N, C) floating.
        target: (N,) int64 in 0 … C − 1.
        permutation: (N,) int64.
        lam: (N,) in [0, 1], dtype of logits.
        label_smoothing: In [0, 1], as F.cross_entropy's.

    Returns:
        (N,) in the dtype of logits.
    """
    log_probabilities = torch.log_softmax(logits, 1)  # (N, C)
    own = log_probabilities.gather(1, target[:, None]).squeeze(1)
    partner = log_probabilities.gather(1, target[permutation][:, None]).squeeze(1)
    kept = 1 - label_smoothing
    loss = -_weighted(kept * lam, own) - _weighted(kept * (1 - lam), partner)
    if label_smoothing:
        loss = loss - label_smoothing * log_probabilities.mean(1)
    return loss


def mixup_cross_entropy_bwd(grad_loss, logits, target, permutation, lam, label_smoothing=0.0):
    """Gradients by logits and by lam, as formulas that can be differentiated again."""
    classes = logits.shape[1]
    kept = 1 - label_smoothing
    partner_target = target[permutation]
    weights = torch.stack((kept * lam, kept * (1 - lam)), 1)  # (N, 2)
    soft_target = torch.zeros_like(logits).scatter_add(1, torch.stack((target, partner_target), 1), weights)
    soft_target = soft_target + label_smoothing / classes
    grad_logits = grad_loss[:, None] * (torch.softmax(logits, 1) - soft_target)
    own, partner = (logits.gather(1, index[:, None]).squeeze(1) for index in (target, partner_target))
    return grad_logits, -grad_loss * kept * (own - partner)


def _weighted(weight, value):
    """weight · value, where what has no weight counts nothing even if it is infinite or NaN."""
    return weight * value.masked_fill((weight == 0) & ~value.isfinite(), 0)
