"""`patch_errors`: mean squared errors of patches against normalised targets, which are never in memory as a whole.

    loss_p = 1 / C · Σ_c (x_pc − (t_pc − mean_p) · r_p)²,  r_p = 1 / sqrt(variance_p + eps)

A block of patches goes through all steps while it is in the caches; mean and r are kept for backward.
"""

import torch

from ssl_kernels.chunked import patch_errors as chunked
from ssl_kernels.ops.library import accumulation_dtype, all_savable
from ssl_kernels.ops.operation import Operation, has_cpu_kernel, once, overload_of


def _fwd_fake(prediction, target, eps, normalize):
    acc, n = accumulation_dtype(prediction), prediction.shape[0]
    saved = [prediction.new_empty((n, 1) if normalize else (0,), dtype=acc) for _ in range(2)]
    return prediction.new_empty(n, dtype=acc), *saved


def _bwd_fake(grad, prediction, target, mean, rstd):
    return prediction.new_empty(prediction.shape)


_fwd, _bwd = Operation(
    "patch_errors",
    chunked,
    {
        "_fwd": (
            "(Tensor prediction, Tensor target, Tensor eps, bool normalize)"
            " -> (Tensor losses, Tensor mean, Tensor rstd)",
            _fwd_fake,
        ),
        "_bwd": (
            "(Tensor grad, Tensor prediction, Tensor target, Tensor mean, Tensor rstd) -> Tensor",
            _bwd_fake,
        ),
    },
    chosen_by="row_pairs",
).operators
_HAS_KERNEL = has_cpu_kernel("patch_errors_fwd.native")


class _PatchErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, caller, chosen, prediction, target, eps, normalize):
        overload = overload_of(chosen, prediction, _HAS_KERNEL)
        losses, *saved = _fwd[overload](prediction, target, eps, normalize)
        ctx.save_for_backward(*all_savable(prediction, target, *saved))
        ctx.caller, ctx.chosen, ctx.overload = caller, chosen, overload
        return losses

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors

        def make(grad):
            return (_bwd[ctx.overload](grad, *saved),)

        return None, None, *once(ctx.caller, ctx.chosen, (True,), make, (grad,), saved[0]), None, None, None


def patch_errors(prediction, target, eps, normalize, *, caller, chosen):
    """(P,) in the accumulation dtype, of (P, C) each; eps 0-d. The prediction gets its gradient."""
    acc = accumulation_dtype(prediction)
    if (target.dtype == torch.float64) != (acc == torch.float64):
        target = target.to(acc)
    return _PatchErrors.apply(caller, chosen, prediction, target, eps, normalize)
