"""`mixup_cross_entropy` in plain PyTorch, a block of rows at a time. docs/mixing.md is the contract."""

import torch

from ssl_kernels.checks import check_mixed_target_on_cpu
from ssl_kernels.reference.mixup_cross_entropy import target_terms, weighted

LOGITS_PER_BLOCK = 1 << 20  # 4 MB in float32


def _row_blocks(logits):
    step = max(1, LOGITS_PER_BLOCK // logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


class _Terms:
    """The classes and, in float64, the factors of each row as docs/mixing.md names them."""

    def __init__(
        self, classes, target, partner, lam, weight, label_smoothing, ignore_index, partner_is_class
    ):
        check_mixed_target_on_cpu(
            "mixup_cross_entropy", target, partner, lam, classes, ignore_index, partner_is_class
        )
        terms = target_terms(target, partner, lam, weight, ignore_index, partner_is_class)
        kept = 1 - label_smoothing
        self.classes = (terms.own, terms.partner)
        # a and b
        self.weights = tuple(kept * share.double() for share in (terms.own_weight, terms.partner_weight))
        self.spread = label_smoothing / classes * terms.present.double()  # s
        self.counted = terms.counted.double()
        self.mass = self.counted if weight is None else kept * self.counted
        if label_smoothing and weight is not None:
            self.mass = self.mass + weighted(self.spread, weight.sum(dtype=torch.float64))
        self.count = (self.weights[0] != 0) | (self.weights[1] != 0) | (self.spread != 0)


def reduced(loss, counted, dtype, reduction):
    """The loss in `dtype` from each row's in float64, and the denominator of the mean, (0,) for others."""
    if reduction != "mean":
        loss = loss.to(dtype) if reduction == "none" else loss.sum(dtype=dtype)
        return loss, loss.new_empty(0)
    total = counted.sum(dtype=dtype)
    return loss.sum(dtype=dtype) / total, total


def mixup_cross_entropy_fwd(
    logits, target, partner, lam, weight, label_smoothing, ignore_index, partner_is_class, reduction
):
    terms = _Terms(
        logits.shape[1], target, partner, lam, weight, label_smoothing, ignore_index, partner_is_class
    )
    lse = lam.new_empty(len(logits), dtype=torch.float64)
    expected = torch.zeros_like(lse)  # the logit that the mixed target expects
    for block in _row_blocks(logits):
        z = logits[block].to(lam.dtype)
        lse[block] = torch.logsumexp(z, 1).double()
        for index, share in zip(terms.classes, terms.weights, strict=True):
            logit = z.gather(1, index[block, None]).squeeze(1).double()
            expected[block] += weighted(share[block], logit)
        if label_smoothing:
            everywhere = z if weight is None else weighted(weight, z)
            expected[block] += weighted(terms.spread[block], everywhere.sum(1, dtype=torch.float64))
    loss = weighted(terms.mass, lse) - expected
    loss, total = reduced(loss, terms.counted, lam.dtype, reduction)
    return loss, lse, total


def mixup_cross_entropy_bwd(
    grad_loss, logits, target, partner, lam, weight, lse, label_smoothing, ignore_index, partner_is_class
):
    terms = _Terms(
        logits.shape[1], target, partner, lam, weight, label_smoothing, ignore_index, partner_is_class
    )
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    acc = lam.dtype
    grad, mass = grad_loss.to(acc), terms.mass.to(acc)
    for block in _row_blocks(logits):
        z = logits[block].to(acc)
        everywhere = terms.spread[block, None].to(acc)
        if weight is not None:
            everywhere = everywhere * weight
        difference = mass[block, None] * torch.exp((z - lse[block, None]).to(acc)) - everywhere
        for index, share in zip(terms.classes, terms.weights, strict=True):
            difference.scatter_add_(1, index[block, None], -share[block, None].to(acc))
        difference.mul_(grad[block, None]).masked_fill_(~terms.count[block, None], 0)
        grad_logits[block] = difference.to(logits.dtype)
    return grad_logits
