"""The losses: a few lines of algebra each over the operations in `ops/`."""

import torch

from ssl_kernels.checks import check_embeddings, check_reduction, check_same_rows, check_scalar
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import accumulation_dtype


def nt_xent_loss(z0, z1, temperature=0.5, *, normalize=True, reduction="mean", backend=None):
    """NT-Xent, the loss of SimCLR: each of the 2B views against its partner and the 2B − 2 others.

        loss_i = −log( exp(s_i,p(i)) / Σ_{j ≠ i} exp(s_ij) ),  s_ij = <z_i, z_j> / temperature

    over the rows z of z0 above z1, where p(i) is the other view of i. Natural logarithm.

    Args:
        z0, z1: Embeddings of the two views, (B, D) each, row i of both from the same sample. float64, float32,
            float16 or bfloat16, any strides. Under autocast they may differ in dtype; the wider one is used.
        temperature: > 0, a float or a 0-d tensor, which gets its gradient.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12).
        reduction: "mean" over the 2B rows, "sum", or "none".
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (2B,) for "none", the rows of z0 first.

    Raises:
        TypeError: z0 or z1 is no floating tensor, or their dtypes differ outside autocast.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, temperature not > 0, an unknown reduction
            or backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Chen et al., SimCLR, arXiv:2002.05709, eq. 1.
    """
    op = "nt_xent_loss"
    z0, z1 = _widest_under_autocast(z0, z1)
    check_embeddings(op, z0=z0, z1=z1)
    check_same_rows(op, z0=z0, z1=z1)
    check_scalar(op, "temperature", temperature, z0, positive=True)
    check_reduction(op, reduction)
    views = torch.cat((z0, z1))
    partner = torch.arange(-len(z0), len(z0), device=views.device)  # negative indices count from the end
    lse, _, positive = contrastive(
        views,
        None,
        _inverse(temperature, views),
        positives=partner,
        normalize_rows=normalize,
        backend=backend,
        caller=op,
    )
    return _reduce(lse - positive, reduction, views)


nt_xent_loss.operation = "contrastive"


def _widest_under_autocast(*tensors):
    """Under autocast, tensors of different dtypes in the widest of them; otherwise as they are."""
    if not all(isinstance(tensor, torch.Tensor) and tensor.is_floating_point() for tensor in tensors):
        return tensors
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    widest = tensors[0].dtype
    for tensor in tensors[1:]:
        widest = torch.promote_types(widest, tensor.dtype)
    return tuple(tensor.to(widest) for tensor in tensors)


def _inverse(temperature, like):
    """1 / temperature as a 0-d tensor in the accumulation dtype of `like`."""
    acc = accumulation_dtype(like)
    if isinstance(temperature, torch.Tensor):
        return 1 / temperature.to(acc)
    return torch.scalar_tensor(1 / temperature, dtype=acc, device=like.device)


def _reduce(loss, reduction, like):
    """Rows' losses, float64, to what the caller asked for, in the accumulation dtype of `like`."""
    acc = accumulation_dtype(like)
    if reduction == "mean":
        return loss.mean(dtype=acc)
    if reduction == "sum":
        return loss.sum(dtype=acc)
    return loss.to(acc)
