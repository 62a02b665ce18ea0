"""RotNet: tell by how many quarter turns an image was rotated.

Source: Gidaris et al., arXiv:1803.07728.
"""

import torch

from ssl_kernels.recipes.methods.classifier import Classifier


class Rotation(Classifier):
    def __init__(self, encoder, data):
        super().__init__(encoder, classes=4)

    def forward(self, batch):
        (images,) = batch.views
        turned = torch.cat([images.rot90(turns, dims=(2, 3)) for turns in range(4)])
        turns = torch.arange(4, device=images.device).repeat_interleave(len(images))
        return self.criterion(self.online(turned), turns)
