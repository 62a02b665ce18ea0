"""The losses, one file each: a few lines of algebra over the operations in `ops/`. docs/losses.md lists them."""

from ssl_kernels.losses.byol import byol_loss
from ssl_kernels.losses.clip import clip_loss
from ssl_kernels.losses.dcl import dcl_loss
from ssl_kernels.losses.debiased import debiased_nt_xent_loss
from ssl_kernels.losses.imix import imix_loss
from ssl_kernels.losses.info_nce import info_nce_loss
from ssl_kernels.losses.moco import moco_loss
from ssl_kernels.losses.nt_xent import nt_xent_loss
from ssl_kernels.losses.siglip import siglip_loss
from ssl_kernels.losses.sup_con import sup_con_loss
from ssl_kernels.losses.triplet import triplet_loss
from ssl_kernels.losses.triplet_margin import triplet_margin_loss

__all__ = [
    "byol_loss",
    "clip_loss",
    "dcl_loss",
    "debiased_nt_xent_loss",
    "imix_loss",
    "info_nce_loss",
    "moco_loss",
    "nt_xent_loss",
    "siglip_loss",
    "sup_con_loss",
    "triplet_loss",
    "triplet_margin_loss",
]
