"""The losses, one file each: a few lines of algebra over the operations in `ops/`. docs/losses.md lists them."""

from ssl_kernels.losses.alignment import alignment_loss
from ssl_kernels.losses.barlow_twins import barlow_twins_loss
from ssl_kernels.losses.byol import byol_loss
from ssl_kernels.losses.clip import clip_loss
from ssl_kernels.losses.dcl import dcl_loss
from ssl_kernels.losses.debiased import debiased_nt_xent_loss
from ssl_kernels.losses.dino import dino_loss
from ssl_kernels.losses.distillation import distillation_loss
from ssl_kernels.losses.imix import imix_loss
from ssl_kernels.losses.info_nce import info_nce_loss
from ssl_kernels.losses.koleo import koleo_loss
from ssl_kernels.losses.mae import mae_loss
from ssl_kernels.losses.mil_nce import mil_nce_loss
from ssl_kernels.losses.moco import moco_loss
from ssl_kernels.losses.multiple_negatives_ranking import multiple_negatives_ranking_loss
from ssl_kernels.losses.nt_xent import nt_xent_loss
from ssl_kernels.losses.sampled_softmax import sampled_softmax_loss
from ssl_kernels.losses.siglip import siglip_loss
from ssl_kernels.losses.similarity_cross_entropy import similarity_cross_entropy
from ssl_kernels.losses.sup_con import sup_con_loss
from ssl_kernels.losses.swav import swav_loss
from ssl_kernels.losses.triplet import triplet_loss
from ssl_kernels.losses.triplet_margin import triplet_margin_loss
from ssl_kernels.losses.uniformity import uniformity_loss
from ssl_kernels.losses.vicreg import vicreg_loss

__all__ = [
    "alignment_loss",
    "barlow_twins_loss",
    "byol_loss",
    "clip_loss",
    "dcl_loss",
    "debiased_nt_xent_loss",
    "dino_loss",
    "distillation_loss",
    "imix_loss",
    "info_nce_loss",
    "koleo_loss",
    "mae_loss",
    "mil_nce_loss",
    "moco_loss",
    "multiple_negatives_ranking_loss",
    "nt_xent_loss",
    "sampled_softmax_loss",
    "siglip_loss",
    "similarity_cross_entropy",
    "sup_con_loss",
    "swav_loss",
    "triplet_loss",
    "triplet_margin_loss",
    "uniformity_loss",
    "vicreg_loss",
]
