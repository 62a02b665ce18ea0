"""MoCo v2: queries of an encoder against keys of its slow average and a queue of earlier keys.

The loss is symmetric, as in MoCo v2+: each view's queries against the other view's keys.

Source: He et al., arXiv:1911.05722; Chen et al., arXiv:2003.04297.
"""

import torch

from ssl_kernels import moco_loss
from ssl_kernels.nn import MoCoQueue, MomentumEncoder
from ssl_kernels.recipes.methods.method import Method
from ssl_kernels.recipes.ranks import gathered


class MoCo(Method):
    criterion = staticmethod(moco_loss)

    def __init__(self, encoder, data, *, temperature=0.2, queue_size=1024, momentum=0.99, width=128):
        super().__init__(encoder, width)
        self.average = MomentumEncoder(self.online, momentum)
        self.queue = MoCoQueue(queue_size, width)
        self.temperature = temperature

    def forward(self, batch):
        images = torch.cat(batch.views)
        queries, keys = self.online(images), self.average(images).float()
        loss = self.criterion(queries, keys, self.queue, self.temperature, symmetric=True)
        self.queue.push_(gathered(keys))
        return loss
