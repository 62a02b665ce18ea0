"""The losses as modules."""

from ssl_kernels.nn.losses import (
    BYOLLoss,
    CLIPLoss,
    DCLLoss,
    DebiasedNTXentLoss,
    IMixLoss,
    InfoNCELoss,
    NTXentLoss,
    SigLIPLoss,
    SupConLoss,
    TripletLoss,
    TripletMarginLoss,
)

__all__ = [
    "BYOLLoss",
    "CLIPLoss",
    "DCLLoss",
    "DebiasedNTXentLoss",
    "IMixLoss",
    "InfoNCELoss",
    "NTXentLoss",
    "SigLIPLoss",
    "SupConLoss",
    "TripletLoss",
    "TripletMarginLoss",
]
