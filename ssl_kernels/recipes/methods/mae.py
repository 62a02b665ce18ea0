"""Masked autoencoder: the encoder sees a part of the patches, a small decoder draws the others.

Source: He et al., arXiv:2111.06377.
"""

import torch
from torch import nn

from ssl_kernels import mae_loss
from ssl_kernels.recipes.collapse import ANYTHING
from ssl_kernels.recipes.encoders import transformer_layers
from ssl_kernels.recipes.methods.method import Method


class MAE(Method):
    criterion = staticmethod(mae_loss)
    views = 1
    transformer = True
    least_health = ANYTHING

    def __init__(self, encoder, data, *, hidden_part=0.6, decoder_width=32):
        super().__init__()
        self.seer = encoder
        patches, pixels = encoder.places.shape[0], encoder.embedding.in_features
        if patches < 2:
            raise ValueError(
                f"--image-size must have a divisor from 2 to 8 for --method mae, got {data.image_size}"
            )
        if not 0 < hidden_part < 1:
            raise ValueError(f"--option hidden_part must be a number between 0 and 1, got {hidden_part}")
        self.visible = min(max(1, round((1 - hidden_part) * patches)), patches - 1)
        self.decoder_embedding = nn.Linear(encoder.out_features, decoder_width)
        self.hidden_token = nn.Parameter(torch.zeros(decoder_width))
        self.decoder_places = nn.Parameter(0.02 * torch.randn(patches, decoder_width))
        self.decoder = transformer_layers(decoder_width, count=1)
        self.pixels = nn.Linear(decoder_width, pixels)

    @property
    def encoder(self):
        return self.seer

    @property
    def watched(self):
        return self.pixels

    def forward(self, batch):
        (images,) = batch.views
        patches = self.encoder.patches(images)  # (B, L, pixels)
        order = torch.rand(patches.shape[:2]).argsort(1).to(patches.device)
        seen = order[:, : self.visible]
        tokens = self.decoder_embedding(self.encoder(images, seen))

        everywhere = self.hidden_token.to(tokens.dtype).expand(*patches.shape[:2], -1)
        at = seen[:, :, None].expand_as(tokens)
        drawn = self.pixels(self.decoder(everywhere.scatter(1, at, tokens) + self.decoder_places))
        hidden = torch.ones_like(order, dtype=torch.bool).scatter(1, seen, False)
        return self.criterion(drawn, patches, hidden)
