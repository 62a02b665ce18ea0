"""`class_contrastive` by its definition, with N × N matrices in memory and PyTorch's own autograd."""

import torch
import torch.nn.functional as F

from ssl_kernels.reference.products import product


def class_contrastive(rows, scale, positives, normalize=True):
    """Log-sum-exp of each row's logits with all others, less the mean of those with its positives.

    Args:
        rows: (N, D) floating.
        scale: 0-d tensor, 1 / temperature.
        positives: (N,) or (N, W) int64 or (N, N) bool; docs/contrastive.md has the contract.
        normalize: L2-normalise first.

    Returns:
        losses, counts: (N,) float64; a row without a positive has loss 0.
    """
    x = F.normalize(rows, dim=1) if normalize else rows
    logits = scale * product(x, x.T)
    identity = torch.eye(x.shape[0], dtype=torch.bool, device=x.device)
    positive = pairs(positives, slice(None)) & ~identity
    counts = positive.sum(1).double()
    log_probabilities = torch.log_softmax(logits.masked_fill(identity, -torch.inf), dim=1)
    total = log_probabilities.masked_fill(~positive, 0).sum(1, dtype=torch.float64)
    return (-total / counts.clamp_min(1)).where(counts > 0, 0), counts


def pairs(positives, block):
    """Which rows are positives of those in `block`, (block, N) bool; the rows themselves as it comes."""
    if positives.dtype == torch.bool:
        return positives[block]
    if positives.dim() == 1:
        return positives[block, None] == positives
    shared = torch.zeros(
        (positives[block].shape[0], positives.shape[0]), dtype=torch.bool, device=positives.device
    )
    for word in positives.unbind(1):
        shared |= (word[block, None] & word) != 0
    return shared
