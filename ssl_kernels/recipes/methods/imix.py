"""i-Mix: contrastive learning of mixed inputs, each of which has two positives, weighted as the inputs were mixed.

Source: Lee et al., arXiv:2010.08887, algorithm 1 (N-pair).
"""

import torch
from torch.distributions import Beta

from ssl_kernels import imix_loss, mixup
from ssl_kernels.recipes.methods.method import Method


class IMix(Method):
    criterion = staticmethod(imix_loss)

    def __init__(self, encoder, data, *, temperature=0.2, alpha=1.0, width=128):
        super().__init__(encoder, width)
        self.temperature, self.alpha = temperature, alpha

    def forward(self, batch):
        view0, view1 = batch.views
        permutation = torch.randperm(len(view0), device=view0.device)
        # By default alpha is checked only until torch.compile is applied to anything in the process.
        lam = Beta(self.alpha, self.alpha, validate_args=True).sample((len(view0),)).to(view0)
        queries, keys = self.online(torch.cat([mixup(view0, lam, permutation), view1])).chunk(2)
        return self.criterion(queries, keys, permutation, lam, self.temperature)
