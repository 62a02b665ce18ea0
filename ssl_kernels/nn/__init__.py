"""The losses as modules."""

from ssl_kernels.nn.losses import NTXentLoss

__all__ = ["NTXentLoss"]
