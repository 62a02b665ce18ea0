"""Networks from images to features, of width `out_features`, and the heads that only training sees."""

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
