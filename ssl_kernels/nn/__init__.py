"""The losses as modules."""

from ssl_kernels.nn.losses import NTXentLoss, SigLIPLoss

__all__ = ["NTXentLoss", "SigLIPLoss"]
