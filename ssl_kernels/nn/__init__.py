"""The losses, the state that training keeps beside them, and the mixing of batches as modules."""

from ssl_kernels.nn.boxes import MixedBoxes
from ssl_kernels.nn.clustering import (
    BarlowTwinsLoss,
    DINOCenter,
    DINOLoss,
    MAELoss,
    SwAVLoss,
    VICRegLoss,
)
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
from ssl_kernels.nn.retrieval import (
    AlignmentLoss,
    DistillationLoss,
    KoLeoLoss,
    MILNCELoss,
    MultipleNegativesRankingLoss,
    SampledSoftmaxLoss,
    SimilarityCrossEntropyLoss,
    UniformityLoss,
)
from ssl_kernels.nn.targets import MixedMasks

__all__ = [
    "AlignmentLoss",
    "BYOLLoss",
    "BarlowTwinsLoss",
    "CLIPLoss",
    "DCLLoss",
    "DINOCenter",
    "DINOLoss",
    "DebiasedNTXentLoss",
    "DistillationLoss",
    "IMixLoss",
    "InfoNCELoss",
    "KoLeoLoss",
    "MAELoss",
    "MILNCELoss",
    "ManifoldMixup",
    "MixedBoxes",
    "MixedMasks",
    "MixingDraw",
    "Mixup",
    "MoCoLoss",
    "MoCoQueue",
    "MomentumEncoder",
    "MultipleNegativesRankingLoss",
    "NTXentLoss",
    "SampledSoftmaxLoss",
    "SigLIPLoss",
    "SimilarityCrossEntropyLoss",
    "SupConLoss",
    "SwAVLoss",
    "TripletLoss",
    "TripletMarginLoss",
    "UniformityLoss",
    "VICRegLoss",
    "cosine_momentum",
]
