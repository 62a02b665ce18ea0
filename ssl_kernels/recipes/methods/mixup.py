"""Supervised training on mixed images: mixup.

Source: Zhang et al., arXiv:1710.09412.
"""

from ssl_kernels import mixup_cross_entropy, nn
from ssl_kernels.recipes.methods.classifier import Classifier


class Mixup(Classifier):
    criterion = staticmethod(mixup_cross_entropy)

    def __init__(self, encoder, data, *, alpha=1.0):
        super().__init__(encoder, data.classes)
        self.mixup = nn.Mixup(mixup_alpha=alpha, mode="sample")

    def forward(self, batch):
        images, (labels, permutation, lam) = self.mixup(batch.views[0].clone(), batch.labels)
        return self.criterion(self.online(images), labels, permutation, lam)
