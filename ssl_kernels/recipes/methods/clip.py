"""CLIP with two toy towers: images against captions that say what class they show, spelled letter by letter.

Source: Radford et al., arXiv:2103.00020.
"""

import math

import torch
from torch import nn

from ssl_kernels import clip_loss
from ssl_kernels.recipes.collapse import BY_CLASS
from ssl_kernels.recipes.encoders import Embedder, mlp
from ssl_kernels.recipes.methods.method import Method

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("a photo of {}", "{} in a picture", "this shows {}", "one image of {}")
LONGEST = 32  # characters of a caption
LARGEST_SCALE = 100


class CLIP(Method):
    criterion = staticmethod(clip_loss)
    views = 1
    least_health = BY_CLASS

    def __init__(self, encoder, data, *, logit_scale=10.0, width=64):
        super().__init__()
        if not 0 < logit_scale <= LARGEST_SCALE:
            raise ValueError(
                f"--option logit_scale must be a number over 0, at most {LARGEST_SCALE}, got {logit_scale}"
            )
        self.online = Embedder(encoder, mlp(encoder.out_features, width))
        self.text = TextTower(width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        names = DIGITS if data.classes <= len(DIGITS) else [f"class {index}" for index in range(data.classes)]
        captions = [[spell(template.format(name)) for template in TEMPLATES] for name in names]
        # (classes, templates, LONGEST)
        self.register_buffer("captions", torch.tensor(captions), persistent=False)

    def forward(self, batch):
        (images,) = batch.views
        template = torch.randint(len(TEMPLATES), batch.labels.shape).to(batch.labels.device)
        texts = self.text(self.captions[batch.labels, template])
        # Equal captions are no negatives of each other.
        return self.criterion(self.online(images), texts, self.log_scale.exp(), ids=batch.labels)

    @torch.no_grad()
    def after_step(self):
        super().after_step()
        # Here and not in the loss, where a scale at its bound would have no gradient that leads back.
        self.log_scale.clamp_(max=math.log(LARGEST_SCALE))


class TextTower(nn.Module):
    """Characters (B, L) to (B, width): their embeddings and places through a layer of attention, averaged."""

    def __init__(self, width, characters=128):
        super().__init__()
        self.character = nn.Embedding(characters, width)
        self.place = nn.Parameter(0.02 * torch.randn(LONGEST, width))
        self.layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True
        )
        self.projection = nn.Linear(width, width)

    def forward(self, characters):
        hidden = self.layer(self.character(characters) + self.place)
        return self.projection(hidden.mean(1))


def spell(text):
    """Codes of its characters, filled up with zeros."""
    codes = list(text.encode("ascii"))[:LONGEST]
    return codes + [0] * (LONGEST - len(codes))
