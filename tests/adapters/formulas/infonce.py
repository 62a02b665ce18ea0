"""Chen et al., arXiv:2002.05709, and the supervised form as the package's README has it."""

import torch

from tests.adapters.formulas import cosines, nt_xent, without
from tests.adapters.uses import Use


class InfoNCE:
    def __init__(self, temperature=0.5):
        self.temperature = temperature

    def __call__(self, features):
        return nt_xent(*features.chunk(2), self.temperature)


class SupervisedInfoNCE:
    def __init__(self, temperature=0.07, supervised=False):
        self.temperature = temperature

    def __call__(self, features, target):
        logits, same = cosines(features, features) / self.temperature, target[:, None] == target
        itself = torch.eye(len(target), dtype=torch.bool)
        logits = logits.masked_fill(itself, 0)
        return (without(logits, same & ~itself).logsumexp(1) - without(logits, ~same).logsumexp(1)).mean()


USES = [
    Use("infonce", "InfoNCE", lambda space, c: space.InfoNCE(c.temperature)(c.rows(2 * c.n))),
    Use(
        "infonce",
        "SupervisedInfoNCE",
        lambda space, c: space.SupervisedInfoNCE(c.temperature)(c.rows(), c.integers(c.pick(1, 3, 2 * c.n))),
    ),
]
