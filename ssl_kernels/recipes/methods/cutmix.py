"""Supervised training on images with a box pasted from another: CutMix.

Source: Yun et al., arXiv:1905.04899.
"""

from ssl_kernels import nn
from ssl_kernels.recipes.methods.mixup import Mixup


class CutMix(Mixup):
    def __init__(self, encoder, data, *, alpha=1.0, prob=0.5):
        super().__init__(encoder, data)
        self.mixup = nn.Mixup(mixup_alpha=0, cutmix_alpha=alpha, prob=prob, mode="sample")
