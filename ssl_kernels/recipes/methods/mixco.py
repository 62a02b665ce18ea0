"""MixCo: MoCo, and beside it mixed queries with two keys each as positives.

Source: Kim et al., arXiv:2010.06300.
"""

import torch
from torch.distributions import Beta

from ssl_kernels import imix_loss, mixup
from ssl_kernels.nn import MoCoQueue, MomentumEncoder
from ssl_kernels.recipes.methods.method import Method
from ssl_kernels.recipes.ranks import gathered


class MixCo(Method):
    criterion = staticmethod(imix_loss)

    def __init__(
        self,
        encoder,
        data,
        *,
        temperature=0.2,
        alpha=1.0,
        weight=1.0,
        queue_size=1024,
        momentum=0.99,
        width=128,
    ):
        super().__init__(encoder, width)
        self.average = MomentumEncoder(self.online, momentum)
        self.queue = MoCoQueue(queue_size, width)
        self.temperature, self.alpha, self.weight = temperature, alpha, weight

    def forward(self, batch):
        view0, view1 = batch.views
        permutation = torch.randperm(len(view0), device=view0.device)
        # By default alpha is checked only until torch.compile is applied to anything in the process.
        lam = Beta(self.alpha, self.alpha, validate_args=True).sample((len(view0),)).to(view0)
        queries, mixed = self.online(torch.cat([view0, mixup(view0, lam, permutation)])).chunk(2)
        keys = self.average(view1).float()

        earlier = self.queue.keys.clone() if len(self.queue) else None
        options = {"temperature": self.temperature, "negative_keys": earlier}
        loss = self.criterion(queries, keys, permutation, 1.0, **options)  # an unmixed query is mixed by 1
        loss = loss + self.weight * self.criterion(mixed, keys, permutation, lam, **options)
        self.queue.push_(gathered(keys))
        return loss
