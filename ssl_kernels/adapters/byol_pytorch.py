"""The loss of byol-pytorch (0.9). It comes back as float32 (float64 for float64)."""

import torch
import torch.nn.functional as F

from ssl_kernels.checks import DTYPES
from ssl_kernels.losses._rows import row_pairs_loss
from ssl_kernels.losses._shared import widest_under_autocast

__all__ = ["cosine_loss_fn"]
ORIGINALS = {"cosine_loss_fn": "byol_pytorch.byol_pytorch"}
DIFFERENCES = {}


def cosine_loss_fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`byol_pytorch.byol_pytorch.cosine_loss_fn`: 2 − 2 · cosine of vectors along the last dimension.

    Args:
        x, y: (..., D); both get their gradients.

    Returns:
        (...), a value a vector.
    """
    x, y = widest_under_autocast(x, y)
    if x.shape == y.shape and x.dtype == y.dtype in DTYPES and x.dim() > 1 and x.numel():
        rows = (part.reshape(-1, part.shape[-1]) for part in (x, y))
        options = {"normalize": True, "measure": "product", "reduction": "none", "caller": "cosine_loss_fn"}
        return row_pairs_loss(*rows, factor=-2.0, constant=2.0, **options).view(x.shape[:-1])
    return 2 - 2 * (F.normalize(x, dim=-1) * F.normalize(y, dim=-1)).sum(-1)
