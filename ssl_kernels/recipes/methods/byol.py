"""BYOL: predict what the slow average makes of the other view. No negatives: predictor and average keep it apart.

Source: Grill et al., arXiv:2006.07733.
"""

import torch

from ssl_kernels import byol_loss
from ssl_kernels.nn import MomentumEncoder
from ssl_kernels.recipes.encoders import mlp
from ssl_kernels.recipes.methods.method import Method


class BYOL(Method):
    criterion = staticmethod(byol_loss)

    def __init__(self, encoder, data, *, momentum=0.99, width=128):
        hidden = 2 * max(encoder.out_features, width)  # wider than in- and output, as in the paper
        super().__init__(encoder, width, hidden)
        self.predictor = mlp(width, width, hidden)
        self.average = MomentumEncoder(self.online, momentum)

    def forward(self, batch):
        view0, view1 = batch.views
        predictions = self.predictor(self.online(torch.cat([view0, view1])))
        targets = self.average(torch.cat([view1, view0]))
        return self.criterion(predictions, targets)
