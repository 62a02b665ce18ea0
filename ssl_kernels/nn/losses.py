"""Losses as modules: each holds the arguments of the function it names."""

from torch import nn

from ssl_kernels import losses


class NTXentLoss(nn.Module):
    """`ssl_kernels.nt_xent_loss` as a module: `NTXentLoss(temperature=0.5)(z0, z1)`.

    Args:
        temperature: > 0, a float, a 0-d tensor, or an `nn.Parameter` to learn it.
        normalize, reduction, backend: As in `nt_xent_loss`.
    """

    def __init__(self, temperature=0.5, *, normalize=True, reduction="mean", backend=None):
        super().__init__()
        self.temperature = temperature
        self.normalize = normalize
        self.reduction = reduction
        self.backend = backend

    def forward(self, z0, z1):
        return losses.nt_xent_loss(
            z0,
            z1,
            self.temperature,
            normalize=self.normalize,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self):
        return f"temperature={self.temperature}, normalize={self.normalize}, reduction={self.reduction!r}"
