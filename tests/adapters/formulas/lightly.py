"""Chen et al., arXiv:2002.05709; He et al., arXiv:1911.05722; Yeh et al., arXiv:2110.06848; arXiv:2011.10566."""

import torch
import torch.nn.functional as F

from tests.adapters.formulas import cosines, nt_xent, unit, without
from tests.adapters.uses import Use


class NTXentLoss:
    def __init__(self, temperature=0.5, memory_bank_size=0):
        self.temperature, self.bank, self.filled = temperature, None, 0
        if memory_bank_size:
            self.bank = unit(torch.randn(memory_bank_size))

    def __call__(self, x0, x1):
        if self.bank is None:
            return nt_xent(x0, x1, self.temperature)
        positive = (unit(x0) * unit(x1)).sum(1, keepdim=True)
        logits = torch.cat((positive, unit(x0) @ self.bank.T.to(x0.dtype)), 1) / self.temperature
        self.bank = self.bank.clone()
        for row in unit(x1).detach():
            self.bank[self.filled % len(self.bank)] = row
            self.filled += 1
        return F.cross_entropy(logits, torch.zeros(len(x0), dtype=torch.long))


class DCLLoss:
    def __init__(self, temperature=0.1, weight_fn=None):
        self.temperature, self.weight_fn = temperature, weight_fn

    def __call__(self, x0, x1):
        return (self.of(x0, x1) + self.of(x1, x0)) / 2

    def of(self, x0, x1):
        own = torch.eye(len(x0), dtype=torch.bool).repeat(1, 2)
        logits = cosines(x0, torch.cat((x0, x1))) / self.temperature
        positive = (unit(x0) * unit(x1)).sum(1) / self.temperature
        weight = self.weight_fn(unit(x0), unit(x1)) if self.weight_fn else 1
        return (without(logits, own).logsumexp(1) - weight * positive).mean()


class DCLWLoss(DCLLoss):
    def __init__(self, temperature=0.1, sigma=0.5):
        def weights(x0, x1):
            return 2 - len(x0) * F.softmax((x0 * x1).sum(1).detach() / sigma, 0)

        super().__init__(temperature, weights)


class NegativeCosineSimilarity:
    def __init__(self, dim=1, eps=1e-8):
        self.dim = dim

    def __call__(self, x0, x1):
        x0, x1 = (F.normalize(x, dim=self.dim) for x in (x0, x1))
        return -(x0 * x1).sum(self.dim).mean()


class MemoryBankModule:
    def __init__(self, size):
        self.bank, self.filled = unit(torch.randn(size)), 0

    def __call__(self, output, update=False):
        before = self.bank.clone()
        for row in output.detach() if update else ():
            self.bank[self.filled % len(self.bank)] = row
            self.filled += 1
        return output, before.T


def _with_bank(space, case):
    """Three steps; the ring's length is a multiple of the batch, so that lightly loses no row."""
    loss = space.NTXentLoss(case.temperature, (2 * case.n, case.d))
    return [loss(case.rows(), case.rows()) for _ in range(3)]


def _bank(space, case):
    bank = space.MemoryBankModule((2 * case.n, case.d))
    return [part for _ in range(3) for part in bank(case.rows(), update=True)] + [bank(case.rows())[1]]


def _weighted(space, case):
    loss = space.DCLLoss(case.temperature, weight_fn=lambda x0, x1: (x0 - 2 * x1).square().sum(1))
    return loss(case.rows(), case.rows())


def _of_three_dimensions(space, case):
    return space.NegativeCosineSimilarity(2)(case.rows(case.n, 3, case.d), case.rows(case.n, 3, case.d))


USES = [
    Use("lightly", "NTXentLoss", lambda space, c: space.NTXentLoss(c.temperature)(c.rows(), c.rows())),
    Use("lightly", "NTXentLoss", _with_bank, "with a memory bank", dtype=torch.float32),
    Use("lightly", "DCLLoss", lambda space, c: space.DCLLoss(c.temperature)(c.rows(), c.rows())),
    Use("lightly", "DCLLoss", _weighted, "with a weight_fn"),
    Use("lightly", "DCLWLoss", lambda space, c: space.DCLWLoss(c.temperature, 0.7)(c.rows(), c.rows())),
    Use(
        "lightly",
        "NegativeCosineSimilarity",
        lambda space, c: space.NegativeCosineSimilarity()(c.rows(), c.rows()),
    ),
    Use("lightly", "NegativeCosineSimilarity", _of_three_dimensions, "of 3-d vectors"),
    Use("lightly", "MemoryBankModule", _bank, dtype=torch.float32),
]
