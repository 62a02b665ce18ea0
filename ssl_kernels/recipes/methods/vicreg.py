"""VICReg: the views of an image agree, each feature varies over the batch, and features do not vary together.

Source: Bardes et al., arXiv:2105.04906.
"""

import torch

from ssl_kernels import vicreg_loss
from ssl_kernels.recipes.methods.method import Method


class VICReg(Method):
    criterion = staticmethod(vicreg_loss)

    def __init__(self, encoder, data, *, invariance=25.0, variance=25.0, covariance=1.0, width=256):
        super().__init__(encoder, width, hidden=width)
        self.weights = invariance, variance, covariance

    def forward(self, batch):
        z0, z1 = self.online(torch.cat(batch.views)).chunk(2)
        return self.criterion(z0, z1, *self.weights)
