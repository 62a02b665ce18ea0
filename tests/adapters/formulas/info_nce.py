"""van den Oord et al., arXiv:1807.03748."""

import torch
import torch.nn.functional as F

from tests.adapters.formulas import unit
from tests.adapters.uses import Use


class InfoNCE:
    def __init__(self, temperature=0.1, reduction="mean", negative_mode="unpaired"):
        self.options = {"temperature": temperature, "reduction": reduction, "negative_mode": negative_mode}

    def __call__(self, *rows):
        return info_nce(*rows, **self.options)


def info_nce(
    query, positive_key, negative_keys=None, temperature=0.1, reduction="mean", negative_mode="unpaired"
):
    query, positive_key = unit(query), unit(positive_key)
    if negative_keys is None:
        logits, target = query @ positive_key.T, torch.arange(len(query))
    else:
        paired = negative_keys if negative_mode == "paired" else negative_keys.expand(len(query), -1, -1)
        negatives = torch.einsum("nd,nmd->nm", query, unit(paired))
        logits = torch.cat(((query * positive_key).sum(1, keepdim=True), negatives), 1)
        target = torch.zeros(len(query), dtype=torch.long)
    return F.cross_entropy(logits / temperature, target, reduction=reduction)


def _module(mode, reduction):
    def run(space, c):
        negatives = {"none": (), "unpaired": (7, c.d), "paired": (c.n, 5, c.d), "empty": (0, c.d)}[mode]
        loss = space.InfoNCE(c.temperature, reduction, "paired" if mode == "paired" else "unpaired")
        return loss(c.rows(), c.rows(), *([c.rows(*negatives)] if negatives else []))

    return run


USES = [
    Use("info_nce", "InfoNCE", _module("none", "mean")),
    Use("info_nce", "InfoNCE", _module("unpaired", "none"), "with negatives"),
    Use("info_nce", "InfoNCE", _module("paired", "sum"), "with paired negatives"),
    Use("info_nce", "InfoNCE", _module("empty", "mean"), "with no negative"),
    Use(
        "info_nce",
        "info_nce",
        lambda space, c: space.info_nce(c.rows(), c.rows(), c.rows(9), temperature=c.temperature),
    ),
]
