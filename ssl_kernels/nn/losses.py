"""Losses as modules: each holds the arguments of the function it names."""

from torch import nn

from ssl_kernels import losses


class Loss(nn.Module):
    """Holds a loss function's options as attributes of their names; an `nn.Parameter` among them is learned.

    A subclass names the options and their defaults in `__init__` and passes `self.options` on in `forward`.
    """

    def __init__(self, **options):
        super().__init__()
        self._names = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)

    @property
    def options(self):
        return {name: getattr(self, name) for name in self._names}

    def extra_repr(self):
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items() if name != "backend")


class NTXentLoss(Loss):
    """`ssl_kernels.nt_xent_loss` as a module: `NTXentLoss(temperature=0.5)(z0, z1)`.

    Args:
        temperature: > 0, a float, a 0-d tensor, or an `nn.Parameter` to learn it.
        normalize, reduction, backend: As in `nt_xent_loss`.
    """

    def __init__(self, temperature=0.5, *, normalize=True, reduction="mean", backend=None):
        super().__init__(temperature=temperature, normalize=normalize, reduction=reduction, backend=backend)

    def forward(self, z0, z1):
        return losses.nt_xent_loss(z0, z1, **self.options)


class SigLIPLoss(Loss):
    """`ssl_kernels.siglip_loss` as a module: `SigLIPLoss(scale, bias)(image_features, text_features)`.

    Args:
        logit_scale, logit_bias: A float, a 0-d tensor, or an `nn.Parameter` to learn it. The paper learns the
            logarithm of the scale: call `siglip_loss` with its exponential for that.
        normalize, reduction, backend: As in `siglip_loss`.
    """

    def __init__(self, logit_scale=10.0, logit_bias=-10.0, *, normalize=True, reduction="mean", backend=None):
        super().__init__(
            logit_scale=logit_scale,
            logit_bias=logit_bias,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(self, image_features, text_features):
        return losses.siglip_loss(image_features, text_features, **self.options)


class TripletLoss(Loss):
    """`ssl_kernels.triplet_loss` as a module: `TripletLoss(margin=0.2)(embeddings, labels)`.

    Args:
        margin: >= 0, a float, a 0-d tensor, or an `nn.Parameter` to learn it.
        mining, distance, normalize, reduction, backend: As in `triplet_loss`.
    """

    def __init__(
        self,
        margin=0.2,
        *,
        mining="batch_hard",
        distance="euclidean",
        normalize=True,
        reduction="mean",
        backend=None,
    ):
        super().__init__(
            margin=margin,
            mining=mining,
            distance=distance,
            normalize=normalize,
            reduction=reduction,
            backend=backend,
        )

    def forward(self, embeddings, labels):
        return losses.triplet_loss(embeddings, labels, **self.options)
