"""Supervised training without mixing, which mixup, CutMix and manifold mixup are held against."""

from ssl_kernels.recipes.methods.classifier import Classifier


class Supervised(Classifier):
    def __init__(self, encoder, data, *, label_smoothing=0.0):
        super().__init__(encoder, data.classes)
        self.label_smoothing = label_smoothing

    def forward(self, batch):
        logits = self.online(batch.views[0])
        return self.criterion(logits, batch.labels, label_smoothing=self.label_smoothing)
