"""Training over several processes with torch.distributed: the losses of the global batch. See docs/distributed.md."""

from ssl_kernels.distributed.gather_keys import gather_keys
from ssl_kernels.distributed.losses import (
    byol_loss,
    clip_loss,
    dcl_loss,
    debiased_nt_xent_loss,
    info_nce_loss,
    moco_loss,
    nt_xent_loss,
    siglip_loss,
    sup_con_loss,
    triplet_loss,
)

__all__ = [
    "byol_loss",
    "clip_loss",
    "dcl_loss",
    "debiased_nt_xent_loss",
    "gather_keys",
    "info_nce_loss",
    "moco_loss",
    "nt_xent_loss",
    "siglip_loss",
    "sup_con_loss",
    "triplet_loss",
]
