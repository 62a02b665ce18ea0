"""The losses and the mixing of batches as modules."""

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
from ssl_kernels.nn.mixing import ManifoldMixup, MixingDraw, Mixup

__all__ = [
    "BYOLLoss",
    "CLIPLoss",
    "DCLLoss",
    "DebiasedNTXentLoss",
    "IMixLoss",
    "InfoNCELoss",
    "ManifoldMixup",
    "MixingDraw",
    "Mixup",
    "NTXentLoss",
    "SigLIPLoss",
    "SupConLoss",
    "TripletLoss",
    "TripletMarginLoss",
]
