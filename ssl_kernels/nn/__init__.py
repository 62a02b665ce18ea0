"""The losses, the state that training keeps beside them, and the mixing of batches as modules."""

from ssl_kernels.nn import losses
from ssl_kernels.nn.boxes import MixedBoxes
from ssl_kernels.nn.center import DINOCenter
from ssl_kernels.nn.losses import *
from ssl_kernels.nn.manifold_mixup import ManifoldMixup
from ssl_kernels.nn.mixing import MixingDraw, Mixup
from ssl_kernels.nn.momentum import MomentumEncoder, cosine_momentum
from ssl_kernels.nn.queue import MoCoQueue
from ssl_kernels.nn.targets import MixedMasks

__all__ = [
    "DINOCenter",
    "ManifoldMixup",
    "MixedBoxes",
    "MixedMasks",
    "MixingDraw",
    "Mixup",
    "MoCoQueue",
    "MomentumEncoder",
    "cosine_momentum",
    *losses.__all__,
]
