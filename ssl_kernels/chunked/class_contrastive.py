"""`class_contrastive` in plain PyTorch, a block of rows at a time. docs/contrastive.md is the contract."""

import torch

from ssl_kernels.arguments import ContrastiveForward
from ssl_kernels.chunked.contrastive import Blocks, finite_max, softmax_weights
from ssl_kernels.chunked.rows import input_gradient, without_autocast
from ssl_kernels.reference.class_contrastive import pairs


def _blocks(rows, scale, normalize):
    flags = (normalize, normalize, False, False, False, False)
    return Blocks(ContrastiveForward(rows, None, scale, None, None, None, *flags))


def _positive(positives, block):
    positive = pairs(positives, block)
    # A copy: the pairs may be the user's mask.
    positive = positive.clone() if positives.dtype == torch.bool else positive
    positive.diagonal(offset=block.start).fill_(False)
    return positive


@without_autocast
def class_contrastive_fwd(rows, scale, positives, normalize, keep):
    blocks = _blocks(rows, scale, normalize)
    losses, counts, lse = (torch.empty(len(rows), dtype=torch.float64, device=rows.device) for _ in range(3))
    for block, logits, _ in blocks:
        positive = _positive(positives, block)
        counts[block] = positive.sum(1).double()
        mean = logits.masked_fill(~positive, 0).sum(1, dtype=torch.float64) / counts[block]
        shift = finite_max(logits, 1)
        lse[block] = shift.double() + (logits - shift[:, None]).exp_().sum(1).double().log()
        # A softmax over an infinite logit is NaN.
        loss = (lse[block] - mean).masked_fill(lse[block] == torch.inf, torch.nan)
        losses[block] = loss.where(counts[block] > 0, 0)
    return losses, counts, lse, blocks.row_rnorm, blocks.rows.new_empty(0)


@without_autocast
def class_contrastive_bwd(
    grad_losses, rows, scale, positives, counts, lse, row_rnorm, kept, normalize, rows_need_grad
):
    blocks = _blocks(rows, scale, normalize)
    x = blocks.rows
    grad = grad_losses.where(counts > 0, 0)
    shift, weight = softmax_weights(grad, lse, x.dtype)
    share = (grad / counts.clamp_min(1)).to(x.dtype)
    back = positives.mT if positives.dtype == torch.bool else positives
    grad_x = torch.empty_like(x)
    for block, logits, _ in blocks:
        coefficients = (logits - shift[block, None]).exp_() * weight[block, None]
        coefficients += (logits - shift).exp_() * weight
        # Before the product: a softmax near its target leaves little of two large numbers.
        coefficients -= share[block, None] * _positive(positives, block)
        coefficients -= share * _positive(back, block)
        grad_x[block] = coefficients @ x
    grad_scale = (x * grad_x).sum(dtype=torch.float64).to(x.dtype) / 2
    if not rows_need_grad:
        return rows.new_empty(0), grad_scale
    return input_gradient(scale * grad_x, x, row_rnorm).to(rows.dtype), grad_scale
