"""`RandomMixUpV2` and `RandomCutMixV2` of kornia (0.9)."""

import torch

from ssl_kernels.adapters._shared import classes_of
from ssl_kernels.mixing import cutmix, mixup

ORIGINALS = {
    "RandomMixUpV2": "kornia.augmentation._2d.mix.mixup",
    "RandomCutMixV2": "kornia.augmentation._2d.mix.cutmix",
}
__all__ = sorted(ORIGINALS)
DIFFERENCES = {
    "RandomMixUpV2": "rounded once, not three times; λ is the partner's share and uniform, as in kornia",
    "RandomCutMixV2": "num_mix > 1 runs kornia's own code, with a warning",
}


def blend(images, partners, lam):
    """images · (1 − λ) + partners · λ: kornia's λ is the partner's share."""
    return mixup(images, 1 - lam, partners)


def paste(images, partners, corners):
    """The partner's box in each image; corners (B, 4, 2) are (x, y), the last ones inside."""
    begin, end = corners[:, 0].long(), corners[:, 2].long() + 1
    boxes = torch.stack((begin[:, 1], end[:, 1], begin[:, 0], end[:, 0]), 1)
    return cutmix(images, boxes, partners)


__getattr__ = classes_of(__name__)
