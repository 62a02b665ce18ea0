"""SimCLR: two views of each image, each against all other rows of the batch.

Source: Chen et al., arXiv:2002.05709.
"""

import torch

from ssl_kernels import nt_xent_loss
from ssl_kernels.recipes.methods.method import Method


class SimCLR(Method):
    criterion = staticmethod(nt_xent_loss)

    def __init__(self, encoder, data, *, temperature=0.5, width=128):
        super().__init__(encoder, width)
        self.temperature = temperature

    def forward(self, batch):
        z0, z1 = self.online(torch.cat(batch.views)).chunk(2)
        return self.criterion(z0, z1, self.temperature)
