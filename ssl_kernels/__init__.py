"""Fused kernels for self-supervised learning: contrastive losses as drop-in replacements.

>>> import torch, ssl_kernels
>>> z0, z1 = torch.randn(2, 256, 128)
>>> loss = ssl_kernels.nt_xent_loss(z0, z1, temperature=0.5)
"""

import os

from ssl_kernels import adapters, nn
from ssl_kernels.adapters import patch
from ssl_kernels.backends import backends_for, use_backend
from ssl_kernels.gradient_cache import grad_cache
from ssl_kernels.losses import (
    alignment_loss,
    byol_loss,
    clip_loss,
    dcl_loss,
    debiased_nt_xent_loss,
    distillation_loss,
    imix_loss,
    info_nce_loss,
    koleo_loss,
    mil_nce_loss,
    moco_loss,
    multiple_negatives_ranking_loss,
    nt_xent_loss,
    sampled_softmax_loss,
    siglip_loss,
    similarity_cross_entropy,
    sup_con_loss,
    triplet_loss,
    triplet_margin_loss,
    uniformity_loss,
)
from ssl_kernels.losses.matryoshka import matryoshka
from ssl_kernels.memory import empty_cache
from ssl_kernels.mixing import cutmix, cutmix_, mixup, mixup_, mixup_cross_entropy, mixup_normalize

__version__ = "0.1.0"
__all__ = [
    "adapters",
    "alignment_loss",
    "backends_for",
    "byol_loss",
    "clip_loss",
    "cutmix",
    "cutmix_",
    "dcl_loss",
    "debiased_nt_xent_loss",
    "distillation_loss",
    "empty_cache",
    "grad_cache",
    "imix_loss",
    "info_nce_loss",
    "koleo_loss",
    "matryoshka",
    "mil_nce_loss",
    "mixup",
    "mixup_",
    "mixup_cross_entropy",
    "mixup_normalize",
    "moco_loss",
    "multiple_negatives_ranking_loss",
    "nn",
    "nt_xent_loss",
    "patch",
    "sampled_softmax_loss",
    "siglip_loss",
    "similarity_cross_entropy",
    "sup_con_loss",
    "triplet_loss",
    "triplet_margin_loss",
    "uniformity_loss",
    "use_backend",
]

if os.environ.get("SSL_KERNELS_PATCH"):
    adapters._patching.patch_from_environment(os.environ["SSL_KERNELS_PATCH"])
