"""What the chunked operations share: rows in the accumulation dtype, the gradient through their normalisation."""

import torch

from ssl_kernels.constants import NORM_EPS

LOGITS_PER_BLOCK = 1 << 22  # 16 MB in float32


def unit_rows(x, normalize):
    """Rows in the accumulation dtype, normalised if asked, and 1 / max(norm, eps), (0,) if not."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if not normalize:
        return x, x.new_empty(0)
    rnorm = 1 / torch.linalg.vector_norm(x, dim=1).clamp_min(NORM_EPS)
    return x * rnorm[:, None], rnorm


def input_gradient(grad, unit, rnorm):
    """Through the normalisation, as F.normalize differentiates it: rows shorter than eps are only scaled."""
    if not rnorm.shape[0]:
        return grad
    on_sphere = rnorm < 1 / NORM_EPS
    radial = (unit * grad).sum(1).where(on_sphere, 0)
    return rnorm[:, None] * (grad - radial[:, None] * unit)


def input_gradient_(grad, unit, rnorm):
    """`input_gradient` in the place of the gradient, in two passes over it and one for the dots."""
    if not rnorm.shape[0]:
        return grad
    radial = torch.bmm(unit[:, None], grad[:, :, None])[:, 0, 0].where(rnorm < 1 / NORM_EPS, 0)
    return grad.mul_(rnorm[:, None]).addcmul_(unit, (radial * rnorm)[:, None], value=-1)


def without_autocast(function):
    """`function` with autocast off: the operations choose their dtypes themselves."""

    def run(*args):
        rows = next(arg for arg in args if isinstance(arg, torch.Tensor))
        with torch.autocast(rows.device.type, enabled=False):
            return function(*args)

    return run
