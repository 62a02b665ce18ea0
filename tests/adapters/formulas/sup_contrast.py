"""Khosla et al., arXiv:2004.11362, eq. 2."""

import torch

from tests.adapters.formulas import without
from tests.adapters.uses import Use


class SupConLoss:
    def __init__(self, temperature=0.07, contrast_mode="all", base_temperature=0.07):
        self.temperature, self.mode, self.factor = temperature, contrast_mode, temperature / base_temperature

    def __call__(self, features, labels=None, mask=None):
        batch, views = features.shape[:2]
        if mask is None:
            labels = torch.arange(batch) if labels is None else labels
            mask = labels[:, None] == labels
        rows = torch.cat(features.flatten(2).unbind(1))
        itself = torch.eye(len(rows), dtype=torch.bool)
        logits, positive = rows @ rows.T / self.temperature, mask.bool().repeat(views, views) & ~itself
        terms = (logits - without(logits, itself).logsumexp(1, keepdim=True)).masked_fill(~positive, 0)
        losses = -self.factor * terms.sum(1) / positive.sum(1).clamp(min=1)
        return losses.mean() if self.mode == "all" else losses[:batch].mean()


def _features(c, views):
    return c.leaf(
        torch.nn.functional.normalize(c.rows(c.n, views, c.d, grad=False).double(), dim=-1).to(c.dtype)
    )


def _labelled(mode):
    def run(space, c):
        loss = space.SupConLoss(c.temperature, mode, c.pick(0.07, 1.0))
        return loss(_features(c, c.pick(1, 2, 3)), c.pick(c.integers(3), c.integers(3, c.n, 1)).reshape(-1))

    return run


def _masked(space, c):
    mask = (c.integers(3, c.n, c.n) == 0).float().fill_diagonal_(1)
    return space.SupConLoss(c.temperature, c.pick("all", "one"))(_features(c, 2), mask=mask)


def _unlabelled(space, c):
    return space.SupConLoss(c.temperature)(_features(c, 2))


USES = [
    Use("sup_contrast", "SupConLoss", _labelled("all")),
    Use("sup_contrast", "SupConLoss", _labelled("one"), 'with contrast_mode "one"'),
    Use("sup_contrast", "SupConLoss", _masked, "with a mask"),
    Use("sup_contrast", "SupConLoss", _unlabelled, "without labels"),
]
