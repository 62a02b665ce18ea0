"""SwAV: predict from each crop to which prototypes another view of its image was assigned; all are used alike.

Source: Caron et al., arXiv:2006.09882.
"""

import torch
from torch import nn

from ssl_kernels import swav_loss
from ssl_kernels.recipes.methods.method import Method


class SwAV(Method):
    criterion = staticmethod(swav_loss)
    crops = 2

    def __init__(self, encoder, data, *, temperature=0.1, epsilon=0.05, prototypes=60, width=128):
        super().__init__(encoder, width)
        self.prototypes = nn.Linear(width, prototypes, bias=False)
        self.temperature, self.epsilon = temperature, epsilon

    def forward(self, batch):
        # Crops of one size go through the network together; the views come last, since they are watched.
        crops = self.online(torch.cat(batch.crops)).chunk(self.crops)
        views = self.online(torch.cat(batch.views)).chunk(2)
        features = [*views, *crops]
        return self.criterion(features, self.prototypes.weight, self.temperature, epsilon=self.epsilon)
