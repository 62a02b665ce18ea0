"""The losses, one file each: a few lines of algebra over the operations in `ops/`. docs/losses.md lists them."""

from ssl_kernels.losses.nt_xent import nt_xent_loss
from ssl_kernels.losses.siglip import siglip_loss
from ssl_kernels.losses.triplet import triplet_loss

__all__ = ["nt_xent_loss", "siglip_loss", "triplet_loss"]
