"""Mixup by its definition, new tensors throughout; PyTorch's own autograd differentiates it."""

import torch


def mixup(x, lam, permutation):
    """λ_i x_i + (1 − λ_i) x_p(i) in the dtype of x; docs/mixing.md is the contract.

    Args:
        x: (B, ...) floating.
        lam: (B,) in [0, 1], dtype of x.
        permutation: (B,) int64.

    Returns:
        Tensor like x.
    """
    partner = x.index_select(0, permutation)
    share = per_sample(lam, x)
    mixed = _weighted(share, x) + _weighted(1 - share, partner)
    fixed = permutation == torch.arange(permutation.shape[0], device=permutation.device)
    return torch.where(per_sample(fixed, x), x, mixed)


def _weighted(weight, value):
    """weight · value, where what has no weight counts nothing even if it is infinite or NaN."""
    return weight * value.masked_fill((weight == 0) & ~value.isfinite(), 0)


def mixup_bwd(grad, x, lam, permutation):
    """Gradients of `mixup` by x and by lam, as formulas that can be differentiated again.

    Args:
        grad: Gradient of the result, (B, ...).
        x: (B, ...), or None: no gradient by lam.

    Returns:
        grad_x like grad, and grad_lam (B,) or None.
    """
    here = torch.arange(permutation.shape[0], device=permutation.device)
    inverse = inverse_permutation(permutation)
    to_partner = _weighted(per_sample(1 - lam, grad), grad).index_select(0, inverse)
    passed_on = _weighted(per_sample(lam, grad), grad) + to_partner
    grad_x = torch.where(per_sample(permutation == here, grad), grad, passed_on)
    if x is None:
        return grad_x, None
    return grad_x, (grad * (x - x.index_select(0, permutation))).flatten(1).sum(1)


def inverse_permutation(permutation):
    """q with permutation[q[j]] = j."""
    here = torch.arange(permutation.shape[0], device=permutation.device)
    return torch.empty_like(here).scatter_(0, permutation, here)


def per_sample(values, x):
    """(B,) values in a shape that broadcasts against x (B, ...)."""
    return values.view(-1, *[1] * (x.dim() - 1))
