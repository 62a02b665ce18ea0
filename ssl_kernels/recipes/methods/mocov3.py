"""MoCo v3: no queue; a predictor on the queries, and the keys of the batch as negatives.

Source: Chen et al., arXiv:2104.02057, algorithm 1.
"""

import torch

from ssl_kernels import moco_loss
from ssl_kernels.nn import MomentumEncoder
from ssl_kernels.recipes.encoders import mlp
from ssl_kernels.recipes.methods.method import Method


class MoCoV3(Method):
    criterion = staticmethod(moco_loss)

    def __init__(self, encoder, data, *, temperature=0.2, momentum=0.99, width=128):
        super().__init__(encoder, width)
        self.predictor = mlp(width, width)
        self.average = MomentumEncoder(self.online, momentum)
        self.temperature = temperature

    def forward(self, batch):
        images = torch.cat(batch.views)
        queries = self.predictor(self.online(images))
        return self.criterion(queries, self.average(images), None, self.temperature, symmetric=True)
