"""What every method is to the training loop."""

from torch import nn

from ssl_kernels.recipes.collapse import EMBEDDINGS
from ssl_kernels.recipes.encoders import Embedder, mlp


class Method(nn.Module):
    """A network and its loss: called with a `views.Batch`, it returns the loss, a scalar.

    A subclass takes (encoder, data, *, options with defaults): a network of width `out_features`, and the `ImageData`
    that it will see. `online` is an `encoders.Embedder`, whose encoder is kept after training: the one of a usual head
    that is made of (encoder, width), or what the subclass sets.

    Attributes:
        average: Of `online`, an `nn.MomentumEncoder` that follows each step, where a method has one.
        criterion: The loss that `forward` calls with embeddings; the training loop puts one in its place that is timed.
        views, crops: How many of each image it asks for.
        least_health: Of the outputs of `watched`, below which they are said to have collapsed.
        transformer: Whether its encoder is a `PatchTransformer` instead of a convolutional network.
    """

    criterion = None
    views, crops = 2, 0
    transformer = False
    least_health = EMBEDDINGS

    def __init__(self, encoder=None, width=None, hidden=None):
        super().__init__()
        if encoder is not None:
            self.online = Embedder(encoder, mlp(encoder.out_features, width, hidden))

    @property
    def places_embeddings(self):
        """Whether the outputs of `online` are what the method places; else the features are looked at."""
        return self.watched is getattr(self, "online", None)

    @property
    def encoder(self):
        return self.online.encoder

    @property
    def watched(self):
        """The module whose outputs must not collapse."""
        return self.online

    def after_step(self):
        """Called when the optimizer has changed the parameters."""
        if hasattr(self, "average"):
            self.average.update_(self.online)
