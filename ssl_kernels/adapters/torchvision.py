"""`torchvision.transforms.v2.MixUp` and `CutMix` (torchvision 0.26 and later)."""

import torch

from ssl_kernels.adapters._shared import classes_of
from ssl_kernels.mixing import cutmix, mixup

ORIGINALS = {"MixUp": "torchvision.transforms.v2._augment", "CutMix": "torchvision.transforms.v2._augment"}
__all__ = sorted(ORIGINALS)
DIFFERENCES = {
    "MixUp": "an integer alpha works (torchvision: NotImplementedError at the call); rounded once, not three times",
    "CutMix": "an integer alpha works",
}


def blend(images, lam):
    """images · λ + the images before · (1 − λ)."""
    return mixup(images, lam, _before(images))


def paste(images, box):
    """The box (x1, y1, x2, y2) of the image before in each image."""
    x1, y1, x2, y2 = box
    boxes = torch.tensor([[y1, y2, x1, x2]], device=images.device).expand(len(images), 4)
    return cutmix(images, boxes, _before(images))


def _before(images):
    return torch.arange(-1, len(images) - 1, device=images.device).remainder_(len(images))


__getattr__ = classes_of(__name__)
