"""Metric learning by triplets: rows of one label are to lie nearer to each other than to rows of another.

Mining "semi_hard" holds each pair of one label against the nearest row of another label that is farther away than the
pair; "batch_hard" the farthest of a label against the nearest of another, which collapses easily.

Source: Schroff et al., FaceNet, arXiv:1503.03832 (semi-hard); Hermans et al., arXiv:1703.07737 (batch-hard).
"""

import torch

from ssl_kernels import triplet_loss
from ssl_kernels.recipes.collapse import BY_CLASS
from ssl_kernels.recipes.methods.method import Method


class Triplet(Method):
    criterion = staticmethod(triplet_loss)
    least_health = BY_CLASS

    def __init__(self, encoder, data, *, margin=0.2, mining="semi_hard", width=128):
        super().__init__(encoder, width)
        self.margin, self.mining = margin, mining

    def forward(self, batch):
        embeddings = self.online(torch.cat(batch.views))
        return self.criterion(embeddings, batch.labels.repeat(2), self.margin, mining=self.mining)
