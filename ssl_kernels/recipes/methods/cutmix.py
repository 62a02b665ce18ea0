"""Supervised training on images with a box pasted from another: CutMix.

Source: Yun et al., arXiv:1905.04899.
"""

from ssl_kernels import mixup_cross_entropy, nn
from ssl_kernels.recipes.methods.classifier import Classifier


class CutMix(Classifier):
    criterion = staticmethod(mixup_cross_entropy)
    uses_labels = True

    def __init__(self, encoder, data, *, alpha=1.0, prob=0.5):
        super().__init__(encoder, data.classes)
        self.mixup = nn.Mixup(mixup_alpha=0, cutmix_alpha=alpha, prob=prob, mode="sample")

    def forward(self, batch):
        images, (labels, permutation, lam) = self.mixup(batch.views[0].clone(), batch.labels)
        return self.criterion(self.online(images), labels, permutation, lam)
