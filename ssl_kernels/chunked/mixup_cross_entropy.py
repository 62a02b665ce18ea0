"""`mixup_cross_entropy` in plain PyTorch, a block of rows at a time. docs/mixing.md is the contract."""

import torch

from ssl_kernels.value_checks import check_on_cpu

LOGITS_PER_BLOCK = 1 << 20  # 4 MB in float32


def _row_blocks(logits):
    step = max(1, LOGITS_PER_BLOCK // logits.shape[1])
    for start in range(0, len(logits), step):
        yield slice(start, start + step)


def mixup_cross_entropy_fwd(logits, target, permutation, lam, label_smoothing):
    check_on_cpu("mixup_cross_entropy", permutation, lam, target=target, classes=logits.shape[1])
    partner_target = target[permutation]
    lse = lam.new_empty(len(logits), dtype=torch.float64)
    expected = torch.zeros_like(lse)  # the logit that the mixed target expects
    kept = 1 - label_smoothing
    for block in _row_blocks(logits):
        z = logits[block].to(lam.dtype)
        lse[block] = torch.logsumexp(z, 1).double()
        for index, share in ((target, lam), (partner_target, 1 - lam)):
            weight = kept * share[block].double()
            logit = z.gather(1, index[block, None]).squeeze(1).double()
            expected[block] += weight * logit.masked_fill((weight == 0) & ~logit.isfinite(), 0)
        if label_smoothing:
            expected[block] += label_smoothing * z.mean(1, dtype=torch.float64)
    return lse - expected, lse


def mixup_cross_entropy_bwd(grad_loss, logits, target, permutation, lam, lse, label_smoothing):
    check_on_cpu("mixup_cross_entropy", permutation, lam, target=target, classes=logits.shape[1])
    partner_target = target[permutation]
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    kept = 1 - label_smoothing
    grad = grad_loss.to(lam.dtype)
    for block in _row_blocks(logits):
        z = logits[block].to(lam.dtype)
        difference = torch.exp((z - lse[block, None]).to(lam.dtype)) - label_smoothing / z.shape[1]
        difference.scatter_add_(1, target[block, None], -kept * lam[block, None])
        difference.scatter_add_(1, partner_target[block, None], -kept * (1 - lam[block, None]))
        grad_logits[block] = (grad[block, None] * difference).to(logits.dtype)
    return grad_logits
