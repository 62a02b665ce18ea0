"""Networks from images to features, of width `out_features`, and the heads that only training sees."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet


class SmallConvNet(nn.Sequential):
    """Three 3x3 convolutions for images of about 8x8 pixels: (B, channels, H, W) to (B, 4 * width)."""

    def __init__(self, channels=1, width=16):
        super().__init__(
            *_convolution(channels, width),
            *_convolution(width, 2 * width),
            nn.MaxPool2d(2),
            *_convolution(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.out_features = 4 * width


def _convolution(channels_in, channels_out):
    return (
        nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


def resnet18(small_images):
    """torchvision's ResNet-18 without its classifier: (B, 3, H, W) to (B, 512).

    Args:
        small_images: Take SimCLR's stem for CIFAR (arXiv:2002.05709, appendix B.9), a 3x3 convolution of
            stride 1 and no pooling, which keeps the resolution of images up to about 64 pixels.
    """
    encoder = resnet.resnet18(weights=None)
    if small_images:
        encoder.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        encoder.maxpool = nn.Identity()
    encoder.out_features = encoder.fc.in_features
    encoder.fc = nn.Identity()
    return encoder


class Embedder(nn.Module):
    """An encoder, which is kept, and the head on it that only training sees: images to (B, width of the head)."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder = encoder
        self.projection = head

    def forward(self, images):
        return self.projection(self.encoder(images))


def mlp(width_in, width_out, hidden=None):
    """The usual head of two layers, (B, width_in) to (B, width_out); `hidden` is width_in unless given."""
    hidden = hidden or width_in
    return nn.Sequential(
        nn.Linear(width_in, hidden, bias=False),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, width_out),
    )


class PatchTransformer(nn.Module):
    """A small vision transformer: images (B, channels, size, size) to the mean of their tokens, (B, width).

    Args:
        size: Of the images; a patch's side is the least divisor of it from 2 on that makes at most 64 patches.
    """

    def __init__(self, channels, size, width=64, layers=2):
        super().__init__()
        self.side = next(side for side in range(2, size + 1) if size % side == 0 and size // side <= 8)
        self.embedding = nn.Linear(channels * self.side**2, width)
        self.places = nn.Parameter(0.02 * torch.randn((size // self.side) ** 2, width))
        self.layers = transformer_layers(width, layers)
        self.norm = nn.LayerNorm(width)
        self.out_features = width

    def patches(self, images):
        """(B, L, channels * side * side), row by row."""
        return F.unfold(images, self.side, stride=self.side).transpose(1, 2)

    def forward(self, images, seen=None):
        """The mean over the tokens, or with `seen`, numbers of patches (B, S), the tokens of these: (B, S, width)."""
        tokens = self.embedding(self.patches(images)) + self.places
        if seen is not None:
            tokens = tokens.gather(1, seen[:, :, None].expand(-1, -1, tokens.shape[2]))
        tokens = self.norm(self.layers(tokens))
        return tokens.mean(1) if seen is None else tokens


def transformer_layers(width, count):
    """So many layers of self-attention, normalised before each part."""
    layer = nn.TransformerEncoderLayer(
        width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True, norm_first=True
    )
    return nn.TransformerEncoder(layer, count, enable_nested_tensor=False)
