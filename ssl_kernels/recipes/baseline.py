"""The losses in plain PyTorch, as training code writes them: what `nt_xent_loss` and `moco_loss` replace."""

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


def plain_moco_loss(query, key, queue, temperature=0.2, *, symmetric=True):
    """Mean InfoNCE against a queue, through concatenated logits (N, 1 + K).

    Args:
        query, key: (N, D), if symmetric view 0 above view 1; a query's positive is the key of the other view then.
        queue: An `nn.MoCoQueue`.

    Source: He et al., MoCo, arXiv:1911.05722, algorithm 1.
    """
    query, key = F.normalize(query, dim=1), F.normalize(key, dim=1)
    key = torch.cat(key.chunk(2)[::-1]) if symmetric else key
    positive = (query * key).sum(1, keepdim=True)
    # A clone, since backward needs the keys that are overwritten before it.
    negative = query @ queue.keys.clone().T
    logits = torch.cat([positive, negative], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64, device=query.device))
