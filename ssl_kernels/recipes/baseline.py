"""NT-Xent in plain PyTorch, as SimCLR training code writes it: what `nt_xent_loss` replaces."""

import torch
import torch.nn.functional as F


def plain_nt_xent_loss(z0, z1, temperature=0.5):
    """Mean NT-Xent loss of two views, (B, D) each, through the whole matrix of 2B x 2B logits.

    Source: Chen et al., SimCLR, arXiv:2002.05709, eq. 1.
    """
    z = F.normalize(torch.cat([z0, z1]), dim=1)
    logits = z @ z.T / temperature  # (2B, 2B)
    logits.fill_diagonal_(float("-inf"))
    partner = torch.arange(len(z), device=z.device).roll(len(z0))
    return F.cross_entropy(logits, partner)
