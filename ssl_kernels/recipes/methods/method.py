"""What every method is to the training loop."""

from torch import nn

from ssl_kernels.recipes.collapse import EMBEDDINGS


class Method(nn.Module):
    """A network and its loss: called with a `views.Batch`, it returns the loss, a scalar.

    A subclass takes (encoder, data, *, options with defaults): a network of width `out_features`, and the `ImageData`
    that it will see. It sets `online`, an `encoders.Embedder`, whose encoder is kept after training.

    Attributes:
        criterion: The loss that `forward` calls with embeddings; the training loop puts one in its place that is timed.
        views, crops: How many of each image it asks for.
        uses_labels: Whether it is told the labels of the training images.
        least_health: Of the outputs of `watched`, below which they are said to have collapsed.
        transformer: Whether its encoder is a `PatchTransformer` instead of a convolutional network.
    """

    criterion = None
    views, crops = 2, 0
    uses_labels = False
    transformer = False
    least_health = EMBEDDINGS

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
