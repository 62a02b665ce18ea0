"""`patch_errors` in plain PyTorch, blocks of patches that stay in the caches."""

import torch

from ssl_kernels.chunked.rows import without_autocast

NUMBERS_PER_BLOCK = 1 << 16  # 256 KB in float32


def _blocks(prediction, *tensors):
    """Rows of the tensors, block by block."""
    rows = max(1, NUMBERS_PER_BLOCK // prediction.shape[1])
    for start in range(0, prediction.shape[0], rows):
        yield [tensor[start : start + rows] for tensor in (prediction, *tensors)]


@torch.no_grad()
@without_autocast
def patch_errors_fwd(prediction, target, eps, normalize):
    n, c = prediction.shape
    losses = torch.empty(n, dtype=eps.dtype, device=prediction.device)
    mean, rstd = (losses.new_empty((n, 1) if normalize else (0,)) for _ in range(2))
    saved = (mean, rstd) if normalize else ()
    for x, t, loss, *moments in _blocks(prediction, target, losses, *saved):
        x, t = x.to(eps.dtype), t.to(eps.dtype)
        if normalize:
            of_mean, of_rstd = moments
            torch.mean(t, 1, keepdim=True, out=of_mean)
            t = t - of_mean
            squares = torch.linalg.vector_norm(t, dim=1, keepdim=True).square_()
            of_rstd.copy_((squares / (c - 1) + eps).rsqrt_())
            t = torch.addcmul(x, t, of_rstd, value=-1, out=t)
        else:
            t = x - t
        loss.copy_(torch.linalg.vector_norm(t, dim=1).square_().div_(c))
    return losses, mean, rstd


@torch.no_grad()
@without_autocast
def patch_errors_bwd(grad, prediction, target, mean, rstd):
    made = torch.empty_like(prediction, memory_format=torch.contiguous_format)
    saved = (mean, rstd) if len(mean) else ()
    weights = (2 / prediction.shape[1]) * grad[:, None]
    for x, t, out, weight, *moments in _blocks(prediction, target, made, weights, *saved):
        x, t = x.to(grad.dtype), t.to(grad.dtype)
        if moments:
            t = t - moments[0]
            t = torch.addcmul(x, t, moments[1], value=-1, out=t)
        else:
            t = x - t
        torch.mul(t, weight, out=out) if out.dtype == t.dtype else out.copy_(t.mul_(weight))
    return made
