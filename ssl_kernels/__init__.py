"""Fused kernels for self-supervised learning: contrastive losses as drop-in replacements.

>>> import torch, ssl_kernels
>>> z0, z1 = torch.randn(2, 256, 128)
>>> loss = ssl_kernels.nt_xent_loss(z0, z1, temperature=0.5)
"""

import os

from ssl_kernels import adapters, losses, nn
from ssl_kernels.adapters import patch
from ssl_kernels.backends import backends_for, use_backend
from ssl_kernels.gradient_cache import grad_cache
from ssl_kernels.losses import *
from ssl_kernels.losses.matryoshka import matryoshka
from ssl_kernels.losses.sinkhorn import sinkhorn
from ssl_kernels.memory import empty_cache
from ssl_kernels.mixing import cutmix, cutmix_, mixup, mixup_, mixup_cross_entropy, mixup_normalize

__version__ = "0.1.0"
__all__ = [
    "adapters",
    "backends_for",
    "cutmix",
    "cutmix_",
    "empty_cache",
    "grad_cache",
    "matryoshka",
    "mixup",
    "mixup_",
    "mixup_cross_entropy",
    "mixup_normalize",
    "nn",
    "patch",
    "sinkhorn",
    "use_backend",
    *losses.__all__,
]

if os.environ.get("SSL_KERNELS_PATCH"):
    adapters._patching.patch_from_environment(os.environ["SSL_KERNELS_PATCH"])
