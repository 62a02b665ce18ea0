"""The losses as modules."""

from ssl_kernels.nn.losses import NTXentLoss, SigLIPLoss, TripletLoss

__all__ = ["NTXentLoss", "SigLIPLoss", "TripletLoss"]
