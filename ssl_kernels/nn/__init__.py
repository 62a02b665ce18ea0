"""The losses, the state that training keeps beside them, and the mixing of batches as modules."""

from ssl_kernels.nn.losses import (
    BYOLLoss,
    CLIPLoss,
    DCLLoss,
    DebiasedNTXentLoss,
    IMixLoss,
    InfoNCELoss,
    MoCoLoss,
    NTXentLoss,
    SigLIPLoss,
    SupConLoss,
    TripletLoss,
    TripletMarginLoss,
)
from ssl_kernels.nn.manifold_mixup import ManifoldMixup
from ssl_kernels.nn.mixing import MixingDraw, Mixup
from ssl_kernels.nn.momentum import MomentumEncoder, cosine_momentum
from ssl_kernels.nn.queue import MoCoQueue

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
    "MoCoLoss",
    "MoCoQueue",
    "MomentumEncoder",
    "NTXentLoss",
    "SigLIPLoss",
    "SupConLoss",
    "TripletLoss",
    "TripletMarginLoss",
    "cosine_momentum",
]
