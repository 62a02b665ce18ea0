"""What learns by predicting one of several classes."""

from torch import nn

from ssl_kernels.recipes.collapse import ANYTHING
from ssl_kernels.recipes.encoders import Embedder
from ssl_kernels.recipes.methods.method import Method


class Classifier(Method):
    """One view of each image and a linear layer of so many classes on the encoder."""

    criterion = staticmethod(nn.functional.cross_entropy)
    views = 1
    least_health = ANYTHING

    def __init__(self, encoder, classes):
        super().__init__()
        self.online = Embedder(encoder, nn.Linear(encoder.out_features, classes))

    @property
    def watched(self):
        return self.encoder
