"""Grill et al., BYOL, arXiv:2006.07733, eq. 2."""

from tests.adapters.formulas import unit
from tests.adapters.uses import Use


def cosine_loss_fn(x, y):
    return (unit(x) - unit(y)).square().sum(-1)


USES = [
    Use("byol_pytorch", "cosine_loss_fn", lambda space, c: space.cosine_loss_fn(c.rows(), c.rows())),
    Use(
        "byol_pytorch",
        "cosine_loss_fn",
        lambda space, c: space.cosine_loss_fn(c.rows(c.n, 2, c.d), c.rows(c.n, 2, c.d)),
        "of 3-d vectors",
    ),
]
