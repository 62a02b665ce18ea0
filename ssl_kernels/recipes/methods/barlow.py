"""Barlow Twins: the cross-correlation of the features of two views is to be the identity.

Source: Zbontar et al., arXiv:2103.03230.
"""

import torch

from ssl_kernels import barlow_twins_loss
from ssl_kernels.recipes.methods.method import Method


class BarlowTwins(Method):
    criterion = staticmethod(barlow_twins_loss)

    def __init__(self, encoder, data, *, off_diagonal_weight=0.005, width=256):
        super().__init__(encoder, width, hidden=width)
        self.off_diagonal_weight = off_diagonal_weight

    def forward(self, batch):
        z0, z1 = self.online(torch.cat(batch.views)).chunk(2)
        return self.criterion(z0, z1, self.off_diagonal_weight)
