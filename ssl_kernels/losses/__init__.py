"""The losses, one file each: a few lines of algebra over the operations in `ops/`. docs/losses.md lists them."""

from ssl_kernels.losses.nt_xent import nt_xent_loss

__all__ = ["nt_xent_loss"]
