"""Whether embeddings collapse: how far apart they lie, and in how many directions."""

import dataclasses

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Health:
    """Of a batch of embeddings made unit. spread: One less their mean cosine, from 0 where all are the same to 1.
    rank: In how many directions they vary, exp of the entropy of the covariance's normalised eigenvalues (Roy and
    Vetterli, The effective rank, 2007)."""

    spread: float
    rank: float

    def complaint(self, least):
        """What is wrong with them, or "" where they have at least the `Health` given."""
        if self.spread < least.spread:
            return f"all embeddings point the same way: their mean cosine is {1 - self.spread:.4f}"
        if self.rank < least.rank:
            return f"the embeddings vary in one direction alone: their effective rank is {self.rank:.2f}"
        return ""


EMBEDDINGS = Health(spread=0.02, rank=1.5)  # the least of healthy embeddings
BY_CLASS = Health(spread=0.02, rank=0.0)  # of which two need one direction alone
ANYTHING = Health(spread=0.0, rank=0.0)
FEWEST = 8  # embeddings whose rank is judged


def for_so_many(least, count):
    """The `least` of a method for so many embeddings: a few vary in few directions for that reason alone."""
    return least if count >= FEWEST else dataclasses.replace(least, rank=0.0)


def measure_health(embeddings):
    """`Health` of (N, D) embeddings."""
    rows = F.normalize(embeddings.detach().double(), dim=1)
    spread = rows.square().sum(1).mean() - rows.mean(0).square().sum()  # rows of zeros are no further apart
    return Health(float(spread), effective_rank(covariance_spectrum(rows)))


def covariance_spectrum(rows):
    """Eigenvalues of the covariance of (N, D) rows, largest first: min(N, D) of them."""
    centred = rows.double() - rows.double().mean(0)
    return torch.linalg.svdvals(centred).square() / max(1, len(rows) - 1)


def effective_rank(spectrum):
    total = spectrum.sum()
    if not total > 0:
        return 0.0
    shares = spectrum / total
    return float(torch.special.entr(shares).sum().exp())


class Watch:
    """Keeps what a module returned last, and of a batch in parts what it returned last in each.

    Args:
        module: Whose outputs (..., D) are looked at.
    """

    def __init__(self, module):
        self._parts = []
        module.register_forward_hook(self._note)

    def begin_step(self):
        self._parts = []

    def begin_part(self):
        self._parts.append(None)

    def embeddings(self):
        """Those of the last step, (N, D)."""
        return torch.cat(self._parts)

    def _note(self, module, inputs, output):
        if module.training and self._parts:
            self._parts[-1] = output.detach().flatten(0, -2)
