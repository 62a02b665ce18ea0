"""Metric learning by triplets: each row against the farthest of its label and the nearest of another.

Source: Hermans et al., arXiv:1703.07737; Schroff et al., FaceNet, arXiv:1503.03832, whose mining is "semi_hard".
"""

import torch

from ssl_kernels import triplet_loss
from ssl_kernels.recipes.collapse import BY_CLASS
from ssl_kernels.recipes.encoders import Embedder, mlp
from ssl_kernels.recipes.methods.method import Method


class Triplet(Method):
    criterion = staticmethod(triplet_loss)
    uses_labels = True
    least_health = BY_CLASS

    def __init__(self, encoder, data, *, margin=0.2, mining="batch_hard", width=128):
        super().__init__()
        self.online = Embedder(encoder, mlp(encoder.out_features, width))
        self.margin, self.mining = margin, mining

    def forward(self, batch):
        embeddings = self.online(torch.cat(batch.views))
        return self.criterion(embeddings, batch.labels.repeat(2), self.margin, mining=self.mining)
