"""Supervised training with the hidden features of a layer mixed: manifold mixup.

Source: Verma et al., arXiv:1806.05236.
"""

from ssl_kernels import mixup_cross_entropy, nn
from ssl_kernels.recipes.methods.classifier import Classifier


class ManifoldMixup(Classifier):
    criterion = staticmethod(mixup_cross_entropy)

    def __init__(self, encoder, data, *, alpha=2.0):
        super().__init__(encoder, data.classes)
        # The outputs of the first two stages, wherever the network has them.
        layers = (
            ["encoder.layer1", "encoder.layer2"] if hasattr(encoder, "layer1") else ["encoder.2", "encoder.5"]
        )
        self.mixing = nn.ManifoldMixup(self.online, layers, alpha, mode="sample")

    def forward(self, batch):
        logits, (labels, permutation, lam) = self.mixing(batch.views[0], batch.labels)
        return self.criterion(logits, labels, permutation, lam)
