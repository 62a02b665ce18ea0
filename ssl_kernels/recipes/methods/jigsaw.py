"""Jigsaw: tell in which order the tiles of an image were laid.

All 24 orders of four tiles; the shuffled image goes through the encoder whole.

Source: Noroozi and Favaro, arXiv:1603.09246, whose nine tiles go through it one by one.
"""

import itertools

import torch

from ssl_kernels.recipes.methods.classifier import Classifier

ORDERS = tuple(itertools.permutations(range(4)))


class Jigsaw(Classifier):
    def __init__(self, encoder, data):
        if data.image_size % 2:
            raise ValueError(f"--image-size must be even for --method jigsaw, got {data.image_size}")
        super().__init__(encoder, classes=len(ORDERS))
        self.register_buffer("orders", torch.tensor(ORDERS), persistent=False)

    def forward(self, batch):
        (images,) = batch.views
        drawn = torch.randint(len(ORDERS), (len(images),)).to(images.device)
        return self.criterion(self.online(lay_tiles(images, self.orders[drawn])), drawn)


def lay_tiles(images, orders):
    """Images (B, C, H, W), H and W even, with tile orders[:, k] of four (upper left, upper right, lower left, lower
    right) at place k."""
    b, c, h, w = images.shape
    tiles = images.view(b, c, 2, h // 2, 2, w // 2).transpose(3, 4).reshape(b, c, 4, h // 2, w // 2)
    tiles = tiles[torch.arange(b, device=images.device)[:, None], :, orders]  # (B, 4, C, H/2, W/2)
    tiles = tiles.view(b, 2, 2, c, h // 2, w // 2).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(b, c, h, w)
