"""The losses, the state that training keeps beside them, and the mixing of batches as modules."""

from ssl_kernels.losses.alignment import AlignmentLoss
from ssl_kernels.losses.barlow_twins import BarlowTwinsLoss
from ssl_kernels.losses.byol import BYOLLoss
from ssl_kernels.losses.clip import CLIPLoss
from ssl_kernels.losses.dcl import DCLLoss
from ssl_kernels.losses.debiased import DebiasedNTXentLoss
from ssl_kernels.losses.dino import DINOLoss
from ssl_kernels.losses.distillation import DistillationLoss
from ssl_kernels.losses.imix import IMixLoss
from ssl_kernels.losses.info_nce import InfoNCELoss
from ssl_kernels.losses.koleo import KoLeoLoss
from ssl_kernels.losses.mae import MAELoss
from ssl_kernels.losses.mil_nce import MILNCELoss
from ssl_kernels.losses.moco import MoCoLoss
from ssl_kernels.losses.multiple_negatives_ranking import MultipleNegativesRankingLoss
from ssl_kernels.losses.nt_xent import NTXentLoss
from ssl_kernels.losses.sampled_softmax import SampledSoftmaxLoss
from ssl_kernels.losses.siglip import SigLIPLoss
from ssl_kernels.losses.similarity_cross_entropy import SimilarityCrossEntropyLoss
from ssl_kernels.losses.sup_con import SupConLoss
from ssl_kernels.losses.swav import SwAVLoss
from ssl_kernels.losses.triplet import TripletLoss
from ssl_kernels.losses.triplet_margin import TripletMarginLoss
from ssl_kernels.losses.uniformity import UniformityLoss
from ssl_kernels.losses.vicreg import VICRegLoss
from ssl_kernels.nn.boxes import MixedBoxes
from ssl_kernels.nn.center import DINOCenter
from ssl_kernels.nn.manifold_mixup import ManifoldMixup
from ssl_kernels.nn.mixing import MixingDraw, Mixup
from ssl_kernels.nn.momentum import MomentumEncoder, cosine_momentum
from ssl_kernels.nn.queue import MoCoQueue
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
