"""Training over several processes with torch.distributed: the losses of the global batch. See docs/distributed.md."""

from ssl_kernels.distributed.gather_rows import gather_keys, gather_rows
from ssl_kernels.distributed.labelled import sup_con_loss, triplet_loss
from ssl_kernels.distributed.losses import (
    byol_loss,
    clip_loss,
    dcl_loss,
    debiased_nt_xent_loss,
    info_nce_loss,
    nt_xent_loss,
    siglip_loss,
)
from ssl_kernels.distributed.moco import moco_loss
from ssl_kernels.distributed.modules import (
    BYOLLoss,
    CLIPLoss,
    DCLLoss,
    DebiasedNTXentLoss,
    InfoNCELoss,
    MoCoLoss,
    NTXentLoss,
    SigLIPLoss,
    SupConLoss,
    TripletLoss,
)
from ssl_kernels.distributed.shuffle import shuffle_rows, unshuffle_rows

__all__ = [
    "BYOLLoss",
    "CLIPLoss",
    "DCLLoss",
    "DebiasedNTXentLoss",
    "InfoNCELoss",
    "MoCoLoss",
    "NTXentLoss",
    "SigLIPLoss",
    "SupConLoss",
    "TripletLoss",
    "byol_loss",
    "clip_loss",
    "dcl_loss",
    "debiased_nt_xent_loss",
    "gather_keys",
    "gather_rows",
    "info_nce_loss",
    "moco_loss",
    "nt_xent_loss",
    "shuffle_rows",
    "siglip_loss",
    "sup_con_loss",
    "triplet_loss",
    "unshuffle_rows",
]
