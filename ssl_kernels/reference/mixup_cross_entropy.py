"""Cross-entropy against mixed targets by its definition; PyTorch's own autograd differentiates it."""

from typing import NamedTuple

import torch


class TargetTerms(NamedTuple):
    """What each row's loss is made of, (N,) each; the weights in the dtype of lam."""

    own: torch.Tensor  # its class, 0 where that is to be ignored
    partner: torch.Tensor
    own_class_weight: torch.Tensor  # of that class; 0 where it is to be ignored
    partner_class_weight: torch.Tensor
    own_weight: torch.Tensor  # the same times λ_i
    partner_weight: torch.Tensor  # times 1 − λ_i
    has_own: torch.Tensor  # bool, whether the class is none to ignore
    has_partner: torch.Tensor
    present: torch.Tensor  # the shares of those that are none, added up
    counted: torch.Tensor  # the row's weight in the mean


def target_terms(target, partner, lam, weight, ignore_index, partner_is_class):
    classes = (target, partner if partner_is_class else target[partner])
    has_own, has_partner = (label != ignore_index for label in classes)
    own, partner = (label.masked_fill(label == ignore_index, 0) for label in classes)
    shares = (lam * has_own, (1 - lam) * has_partner)
    present = torch.where(has_own & has_partner, 1, shares[0] + shares[1])
    if weight is None:
        class_weights = (has_own.to(lam.dtype), has_partner.to(lam.dtype))
        return TargetTerms(own, partner, *class_weights, *shares, has_own, has_partner, present, present)
    class_weights = (weight[own] * has_own, weight[partner] * has_partner)
    weights = (lam * class_weights[0], (1 - lam) * class_weights[1])
    return TargetTerms(
        own, partner, *class_weights, *weights, has_own, has_partner, present, weights[0] + weights[1]
    )


def mixup_cross_entropy(
    logits,
    target,
    partner,
    lam,
    weight=None,
    label_smoothing=0.0,
    ignore_index=-100,
    partner_is_class=False,
):
    """λ_i times the cross-entropy of each row's class, 1 − λ_i times its partner's; docs/mixing.md is the contract.

    Arguments as of `ops.mixup_cross_entropy.mixup_cross_entropy`, all in the dtype of logits.

    Returns:
        (N,) in the dtype of logits.
    """
    terms = target_terms(target, partner, lam, weight, ignore_index, partner_is_class)
    nothing = ~terms.has_own & ~terms.has_partner
    log_probabilities = torch.log_softmax(logits.masked_fill(nothing[:, None], 0), 1)  # (N, C)
    own = log_probabilities.gather(1, terms.own[:, None]).squeeze(1)
    partner = log_probabilities.gather(1, terms.partner[:, None]).squeeze(1)
    kept = 1 - label_smoothing
    loss = -weighted(kept * terms.own_weight, own) - weighted(kept * terms.partner_weight, partner)
    if label_smoothing:
        everywhere = log_probabilities if weight is None else weighted(weight, log_probabilities)
        loss = loss - weighted(label_smoothing * terms.present, everywhere.mean(1))
    return loss


def mixup_cross_entropy_bwd(
    grad_loss,
    logits,
    target,
    partner,
    lam,
    weight=None,
    label_smoothing=0.0,
    ignore_index=-100,
    partner_is_class=False,
):
    """Gradients by logits and by lam, as formulas that can be differentiated again."""
    classes = logits.shape[1]
    kept = 1 - label_smoothing
    terms = target_terms(target, partner, lam, weight, ignore_index, partner_is_class)
    log_probabilities = torch.log_softmax(logits, 1)
    weights = kept * torch.stack((terms.own_weight, terms.partner_weight), 1)  # (N, 2)
    spread = (label_smoothing / classes * terms.present)[:, None]
    soft_target = torch.zeros_like(logits).scatter_add(1, torch.stack((terms.own, terms.partner), 1), weights)
    soft_target = soft_target + (spread if weight is None else spread * weight)
    mass = weights.sum(1) + (spread * (classes if weight is None else weight.sum())).squeeze(1)
    grad_logits = grad_loss[:, None] * (mass[:, None] * log_probabilities.exp() - soft_target)
    everywhere = (log_probabilities if weight is None else weighted(weight, log_probabilities)).mean(1)
    own, partner = (
        kept * of_class * log_probabilities.gather(1, label[:, None]).squeeze(1)
        + label_smoothing * has * everywhere
        for label, of_class, has in (
            (terms.own, terms.own_class_weight, terms.has_own),
            (terms.partner, terms.partner_class_weight, terms.has_partner),
        )
    )
    return grad_logits, -grad_loss * (own - partner)


def weighted(weight, value):
    """weight · value, where what has no weight counts nothing even if it is infinite or NaN."""
    return weight * value.masked_fill((weight == 0) & ~value.isfinite(), 0)
