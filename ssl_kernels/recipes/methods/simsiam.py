"""SimSiam: BYOL without the average. The gradient stops at the targets, which alone keeps it from collapse.

Source: Chen and He, arXiv:2011.10566, algorithm 1.
"""

import torch
from torch import nn

from ssl_kernels import byol_loss
from ssl_kernels.recipes.encoders import Embedder, mlp
from ssl_kernels.recipes.methods.method import Method


class SimSiam(Method):
    criterion = staticmethod(byol_loss)

    def __init__(self, encoder, data, *, width=128):
        super().__init__()
        head = nn.Sequential(mlp(encoder.out_features, width), nn.BatchNorm1d(width, affine=False))
        self.online = Embedder(encoder, head)
        self.predictor = mlp(width, width, hidden=width // 4)

    def forward(self, batch):
        z0, z1 = self.online(torch.cat(batch.views)).chunk(2)
        predictions = self.predictor(torch.cat([z0, z1]))
        return self.criterion(predictions, torch.cat([z1, z0]).detach())
