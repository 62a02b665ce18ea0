"""solo-learn's losses (1.0.2) for which there are kernels. They come back as float32 (float64 for float64)."""

import torch

from ssl_kernels.adapters._shared import minus_mean_cosine
from ssl_kernels.losses import byol_loss, info_nce_loss, moco_loss, nt_xent_loss, sup_con_loss
from ssl_kernels.losses._shared import checked_rows

__all__ = ["byol_loss_func", "moco_loss_func", "nnclr_loss_func", "simclr_loss_func", "simsiam_loss_func"]
ORIGINALS = {
    "simclr_loss_func": "solo.losses.simclr",
    "moco_loss_func": "solo.losses.moco",
    "byol_loss_func": "solo.losses.byol",
    "simsiam_loss_func": "solo.losses.simsiam",
    "nnclr_loss_func": "solo.losses.nnclr",
}
HOME = "solo.losses"  # where `patch` looks for losses without an adapter
DIFFERENCES = {
    "simclr_loss_func": "the arguments of release 1.0.2, not the repository's (z, indexes), which raise; the diagonal"
    " of extra_pos_mask is not read (solo-learn: a row may be its own positive)",
    "moco_loss_func": "the key gets no gradient, as solo-learn's momentum encoder has none",
    "byol_loss_func": "rows shorter than 1e-8 keep their direction",
    "simsiam_loss_func": "rows shorter than 1e-8 keep their direction",
    "nnclr_loss_func": "of this process's rows, as release 1.0.2 (the repository: p of all processes)",
}


def simclr_loss_func(
    z1: torch.Tensor,
    z2: torch.Tensor,
    temperature: float | torch.Tensor = 0.1,
    extra_pos_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`solo.losses.simclr_loss_func`: NT-Xent; with extra positives SupCon of the two views.

    Args:
        z1, z2: (N, D).
        temperature: > 0.
        extra_pos_mask: (2N, 2N) bool, further positives of each row. Its diagonal is not read; solo-learn's would make
            a row its own positive.
    """
    if extra_pos_mask is None:
        return nt_xent_loss(z1, z2, temperature)
    partner = torch.eye(2 * len(z1), dtype=torch.bool, device=z1.device).roll(len(z1), 0)
    return sup_con_loss(torch.cat((z1, z2)), None, temperature, positives=partner | extra_pos_mask.bool())


def moco_loss_func(
    query: torch.Tensor, key: torch.Tensor, queue: torch.Tensor, temperature: float | torch.Tensor = 0.1
) -> torch.Tensor:
    """`solo.losses.moco_loss_func`: InfoNCE against a queue, of rows as they are.

    Args:
        query, key: (N, D), unit rows. key gets no gradient.
        queue: (D, K), a key per column.
        temperature: > 0.
    """
    return moco_loss(query, key, queue.T, temperature, normalize=False)


def byol_loss_func(p: torch.Tensor, z: torch.Tensor, simplified: bool = True) -> torch.Tensor:
    """`solo.losses.byol_loss_func`: the mean of 2 − 2 · cosine; z gets no gradient.

    Args:
        p, z: (N, D).
        simplified: Not used: the result is the same.
    """
    return byol_loss(p, z)


def simsiam_loss_func(p: torch.Tensor, z: torch.Tensor, simplified: bool = True) -> torch.Tensor:
    """`solo.losses.simsiam_loss_func`: minus the mean cosine; z gets no gradient.

    Args:
        p, z: (N, D).
        simplified: Not used: the result is the same.
    """
    p, z = checked_rows("simsiam_loss_func", 2, p=p, z=z)
    return minus_mean_cosine(p, z.detach(), "simsiam_loss_func")


def nnclr_loss_func(
    nn: torch.Tensor, p: torch.Tensor, temperature: float | torch.Tensor = 0.1
) -> torch.Tensor:
    """`solo.losses.nnclr_loss_func`: InfoNCE of neighbours against predictions.

    Args:
        nn, p: (N, D).
        temperature: > 0.
    """
    return info_nce_loss(nn, p, temperature=temperature)
