"""Supervised contrastive learning: all rows of a label are positives of each other.

Source: Khosla et al., arXiv:2004.11362.
"""

import torch

from ssl_kernels import sup_con_loss
from ssl_kernels.recipes.collapse import BY_CLASS
from ssl_kernels.recipes.methods.method import Method


class SupCon(Method):
    criterion = staticmethod(sup_con_loss)
    least_health = BY_CLASS

    def __init__(self, encoder, data, *, temperature=0.1, width=128):
        super().__init__(encoder, width)
        self.temperature = temperature

    def forward(self, batch):
        features = self.online(torch.cat(batch.views))
        return self.criterion(features, batch.labels.repeat(2), self.temperature)
