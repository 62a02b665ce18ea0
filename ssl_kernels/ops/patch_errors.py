"""`patch_errors`: mean squared errors of patches against normalised targets, which are never in memory as a whole.

    loss_p = 1 / C · Σ_c (x_pc − (t_pc − mean_p) · r_p)²,  r_p = 1 / sqrt(variance_p + eps)

A block of patches goes through all steps while it is in the caches; mean and r are kept for backward.
"""

import torch

from ssl_kernels.chunked import patch_errors as chunked
from ssl_kernels.ops.library import accumulation_dtype, all_savable, library
from ssl_kernels.ops.operation import once

_TARGET = "Tensor prediction, Tensor target"
library.define(
    f"patch_errors_fwd({_TARGET}, Tensor eps, bool normalize) -> (Tensor losses, Tensor mean, Tensor rstd)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
library.define(
    f"patch_errors_bwd(Tensor grad, {_TARGET}, Tensor mean, Tensor rstd) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _fwd_fake(prediction, target, eps, normalize):
    acc, n = accumulation_dtype(prediction), prediction.shape[0]
    saved = [prediction.new_empty((n, 1) if normalize else (0,), dtype=acc) for _ in range(2)]
    return prediction.new_empty(n, dtype=acc), *saved


def _bwd_fake(grad, prediction, target, mean, rstd):
    return prediction.new_empty(prediction.shape)


for _name, _fake in (("patch_errors_fwd", _fwd_fake), ("patch_errors_bwd", _bwd_fake)):
    library.impl(_name, getattr(chunked, _name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"ssl_kernels::{_name}", _fake, lib=library)
_operators = torch.ops.ssl_kernels


class _PatchErrors(torch.autograd.Function):
    @staticmethod
    def forward(ctx, caller, chosen, prediction, target, eps, normalize):
        losses, *saved = _operators.patch_errors_fwd(prediction, target, eps, normalize)
        ctx.save_for_backward(*all_savable(prediction, target, *saved))
        ctx.caller, ctx.chosen = caller, chosen
        return losses

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors

        def make():
            return _operators.patch_errors_bwd(grad, *saved)

        return None, None, once(ctx.caller, ctx.chosen, make, grad, saved[0]), None, None, None


def patch_errors(prediction, target, eps, normalize, *, caller, chosen):
    """(P,) in the accumulation dtype, of (P, C) each; eps 0-d. The prediction gets its gradient."""
    return _PatchErrors.apply(caller, chosen, prediction, target, eps, normalize)
