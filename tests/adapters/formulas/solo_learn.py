"""arXiv:2002.05709, 1911.05722, 2006.07733, 2011.10566, 2104.14548 (NNCLR)."""

import torch
import torch.nn.functional as F

from tests.adapters.formulas import cosines, nt_xent, unit, without
from tests.adapters.uses import Use


def simclr_loss_func(z1, z2, temperature=0.1, extra_pos_mask=None):
    if extra_pos_mask is None:
        return nt_xent(z1, z2, temperature)
    z, itself = torch.cat((z1, z2)), torch.eye(2 * len(z1), dtype=torch.bool)
    logits = cosines(z, z) / temperature
    positive = (itself.roll(len(z1), 0) | extra_pos_mask) & ~itself
    terms = (logits - without(logits, itself).logsumexp(1, keepdim=True)) * positive
    return -(terms.sum(1) / positive.sum(1)).mean()


def moco_loss_func(query, key, queue, temperature=0.1):
    logits = torch.cat(((query * key.detach()).sum(1, keepdim=True), query @ queue), 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.long))


def byol_loss_func(p, z, simplified=True):
    return (unit(p) - unit(z.detach())).square().sum(1).mean()


def simsiam_loss_func(p, z, simplified=True):
    return -(unit(p) * unit(z.detach())).sum(1).mean()


def nnclr_loss_func(nn, p, temperature=0.1):
    return F.cross_entropy(cosines(nn, p) / temperature, torch.arange(len(p)))


def _extra(space, c):
    mask = c.integers(4, 2 * c.n, 2 * c.n) == 0
    return space.simclr_loss_func(c.rows(), c.rows(), c.temperature, mask.fill_diagonal_(False))


def _moco(space, c):
    queue = unit(c.rows(c.d + 3, c.d, grad=False)).T
    return space.moco_loss_func(c.unit_rows(), unit(c.rows(grad=False)), queue, c.temperature)


def _of_pairs(name):
    return lambda space, c: getattr(space, name)(c.rows(), c.rows(), simplified=c.pick(True, False))


USES = [
    Use(
        "solo_learn",
        "simclr_loss_func",
        lambda space, c: space.simclr_loss_func(c.rows(), c.rows(), c.temperature),
    ),
    Use("solo_learn", "simclr_loss_func", _extra, "with extra_pos_mask"),
    Use("solo_learn", "moco_loss_func", _moco),
    Use("solo_learn", "byol_loss_func", _of_pairs("byol_loss_func")),
    Use("solo_learn", "simsiam_loss_func", _of_pairs("simsiam_loss_func")),
    Use(
        "solo_learn",
        "nnclr_loss_func",
        lambda space, c: space.nnclr_loss_func(c.rows(), c.rows(), c.temperature),
    ),
]
