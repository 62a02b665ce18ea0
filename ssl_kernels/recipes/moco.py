"""MoCo v2 pretraining: a query encoder against keys of its slow average and a queue of earlier keys.

The loss is symmetric, as in MoCo v2+: each view's queries against the other view's keys.

Source: He et al., arXiv:1911.05722; Chen et al., arXiv:2003.04297.
"""

import torch
from torch import nn

from ssl_kernels.nn import MoCoQueue, MomentumEncoder
from ssl_kernels.recipes.simclr import read_clock


class MoCoModel(nn.Module):
    """The query model, the average that makes the keys, and their queue: all that a checkpoint must hold.

    Args:
        query: Images (B, C, H, W) to embeddings (B, width), with a part `encoder` that is kept after pretraining.
        width: Of the embeddings.
        queue_size, momentum: Of the queue and the average.
    """

    def __init__(self, query, width, queue_size, momentum):
        super().__init__()
        self.query = query
        self.key = MomentumEncoder(query, momentum)
        self.queue = MoCoQueue(queue_size, width)

    @property
    def encoder(self):
        return self.query.encoder

    def forward(self, images):
        return self.query(images)


def train_step(model, loss, optimizer, view0, view1):
    """One update; returns (loss, seconds in the loss and the push).

    Args:
        model: A `MoCoModel`.
        loss: Called with queries and keys, (2B, width) each, view 0 above view 1, and the queue; returns a scalar.
    """
    images = torch.cat([view0, view1])
    embeddings = model.query(images)
    keys = model.key(images)
    queries = embeddings.detach().requires_grad_()
    start = read_clock(images.device)
    value = loss(queries, keys, model.queue)
    model.queue.push_(keys)
    value.backward()
    seconds = read_clock(images.device) - start

    optimizer.zero_grad()
    embeddings.backward(queries.grad)
    optimizer.step()
    model.key.update_(model.query)
    return value.item(), seconds
