"""`mixup_cross_entropy`: cross-entropy against mixed targets that are never made. docs/mixing.md has the contract."""

import torch

from ssl_kernels import backends
from ssl_kernels.chunked import mixup_cross_entropy as chunked
from ssl_kernels.ops.library import (
    define,
    distinct,
    implement_in_triton,
    library,
    refuse_torch_func,
    savable,
    where_it_runs,
)
from ssl_kernels.reference import mixup_cross_entropy as reference
from ssl_kernels.value_checks import check_on_cpu

_fwd = define(
    "mixup_cross_entropy_fwd",
    "(Tensor logits, Tensor target, Tensor permutation, Tensor lam, float label_smoothing)"
    " -> (Tensor loss, Tensor lse)",
    lambda overload, logits, *_: tuple(
        logits.new_empty(logits.shape[0], dtype=torch.float64) for _ in range(2)
    ),
)
_bwd = define(
    "mixup_cross_entropy_bwd",
    "(Tensor grad_loss, Tensor logits, Tensor target, Tensor permutation, Tensor lam, Tensor lse,"
    " float label_smoothing) -> Tensor grad_logits",
    lambda overload, grad_loss, logits, *_: logits.new_empty(logits.shape),
)

_NAMES = ("mixup_cross_entropy_fwd", "mixup_cross_entropy_bwd")
for _name in _NAMES:
    library.impl(f"{_name}.chunked", getattr(chunked, _name), "CompositeExplicitAutograd")
implement_in_triton(_NAMES, "ssl_kernels.triton.mixup_cross_entropy")
backends.register_operation(
    "mixup_cross_entropy",
    where_it_runs("mixup_cross_entropy_fwd", "ssl_kernels.triton.mixup_cross_entropy"),
)


class _MixupCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, logits, target, permutation, lam, label_smoothing):
        loss, lse = _fwd[backend](logits, target, permutation, lam, label_smoothing)
        ctx.save_for_backward(*map(savable, (logits, target, permutation, lam)), lse)
        ctx.backend, ctx.label_smoothing = backend, label_smoothing
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        logits, target, permutation, lam, lse = ctx.saved_tensors
        _, logits_need_grad, _, _, lam_needs_grad, _ = ctx.needs_input_grad
        grad_logits = grad_lam = None
        if torch.is_grad_enabled():  # formulas that can be differentiated again
            grad_logits, grad_lam = reference.mixup_cross_entropy_bwd(
                grad_loss.to(lam.dtype), logits.to(lam.dtype), target, permutation, lam, ctx.label_smoothing
            )
            return None, grad_logits.to(logits.dtype), None, None, grad_lam, None
        if logits_need_grad:
            operands = (logits, target, permutation, lam, lse)
            grad_logits = _bwd[ctx.backend](grad_loss, *operands, ctx.label_smoothing)
        if lam_needs_grad:
            own, partner = (
                logits.gather(1, index[:, None]).squeeze(1).double()
                for index in (target, target[permutation])
            )
            grad_lam = (-grad_loss * (1 - ctx.label_smoothing) * (own - partner)).to(lam.dtype)
        return None, grad_logits, None, None, grad_lam, None


def mixup_cross_entropy(logits, target, permutation, lam, label_smoothing=0.0, *, backend=None):
    """Loss of each row, (N,) float64. What the public function checks holds here already.

    Args:
        logits: (N, C), float64, float32, float16 or bfloat16; gets its gradient.
        target: (N,) int64.
        permutation: (N,) int64.
        lam: (N,) in the accumulation dtype of logits; gets its gradient.
        label_smoothing: A float in [0, 1].
        backend: One of `backends.BACKENDS`, or None.
    """
    chosen = backends.choose_backend("mixup_cross_entropy", backend, "mixup_cross_entropy", logits)
    if chosen == "reference":
        check_on_cpu("mixup_cross_entropy", permutation, lam, target=target, classes=logits.shape[1])
        with torch.autocast(logits.device.type, enabled=False):
            wide = logits.to(lam.dtype)
            operands = map(savable, (wide, target, permutation, lam))
            return reference.mixup_cross_entropy(*operands, label_smoothing).double()
    refuse_torch_func("mixup_cross_entropy", chosen)
    return _MixupCrossEntropy.apply(chosen, *distinct(logits, target, permutation, lam), label_smoothing)
