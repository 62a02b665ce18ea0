"""`mixup_cross_entropy`: cross-entropy against mixed targets that are never made. docs/mixing.md has the contract."""

import torch

from ssl_kernels import backends
from ssl_kernels.checks import check_mixed_target_on_cpu
from ssl_kernels.chunked import mixup_cross_entropy as chunked
from ssl_kernels.ops.library import all_savable, distinct, refuse_torch_func, savable
from ssl_kernels.ops.operation import Operation
from ssl_kernels.reference import mixup_cross_entropy as reference
from ssl_kernels.reference.mixup_cross_entropy import target_terms

_OPERANDS = "Tensor logits, Tensor target, Tensor partner, Tensor lam, Tensor? weight"
_OPTIONS = "float label_smoothing, int ignore_index, bool partner_is_class"


def _fwd_fake(logits, target, partner, lam, *options):
    reduction = options[-1]
    return (
        lam.new_empty(logits.shape[:1] if reduction == "none" else ()),
        logits.new_empty(logits.shape[0], dtype=torch.float64),
        lam.new_empty(() if reduction == "mean" else 0),
    )


_operation = Operation(
    "mixup_cross_entropy",
    chunked,
    {
        "_fwd": (
            f"({_OPERANDS}, {_OPTIONS}, str reduction) -> (Tensor loss, Tensor lse, Tensor total)",
            _fwd_fake,
        ),
        "_bwd": (
            f"(Tensor grad_loss, {_OPERANDS}, Tensor lse, {_OPTIONS}) -> Tensor grad_logits",
            lambda grad_loss, logits, *_: logits.new_empty(logits.shape),
        ),
    },
)
_fwd, _bwd = _operation.operators


class _MixupCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, logits, target, partner, lam, weight, options, reduction):
        loss, lse, total = _fwd[backend](logits, target, partner, lam, weight, *options, reduction)
        ctx.save_for_backward(*all_savable(logits, target, partner, lam, weight), lse, total, loss)
        ctx.backend, ctx.options, ctx.reduction = backend, options, reduction
        return loss

    @staticmethod
    def backward(ctx, grad):
        logits, target, partner, lam, weight, lse, total, loss = ctx.saved_tensors
        _, logits_need_grad, _, _, lam_needs_grad, _, _, _ = ctx.needs_input_grad
        operands = (logits, target, partner, lam, weight)
        if torch.is_grad_enabled():
            grad_logits, grad_lam = _differentiable_bwd(grad, *operands, ctx.options, ctx.reduction)
            return None, grad_logits, None, None, grad_lam, None, None, None
        grad_logits = grad_lam = None
        per_row = grad / total if ctx.reduction == "mean" else grad
        grad_loss = per_row.double().expand(logits.shape[0])
        if logits_need_grad:
            grad_logits = _bwd[ctx.backend](grad_loss, *operands, lse, *ctx.options)
        if lam_needs_grad:
            mean = loss if ctx.reduction == "mean" else 0
            grad_lam = _grad_lam(ctx.backend, grad_loss, *operands, lse, ctx.options, mean)
        return None, grad_logits, None, None, grad_lam, None, None, None


def _grad_lam(backend, grad_loss, logits, target, partner, lam, weight, lse, options, mean):
    """grad_i (ℓ(y_i) − ℓ(y'_i)), less what λ_i changes in the denominator of the mean."""
    label_smoothing, ignore_index, partner_is_class = options
    terms = target_terms(target, partner, lam, weight, ignore_index, partner_is_class)
    own, partner = (
        of_class.double() * logits.gather(1, label[:, None]).squeeze(1).double()
        for label, of_class in (
            (terms.own, terms.own_class_weight),
            (terms.partner, terms.partner_class_weight),
        )
    )
    change = terms.own_class_weight.double() - terms.partner_class_weight.double()
    difference = (1 - label_smoothing) * (torch.where(change == 0, 0, change * lse) - (own - partner))
    if label_smoothing:  # cancels where both or neither are ignored
        first, everything = torch.zeros_like(target), torch.ones_like(lam)
        smooth, _, _ = _fwd[backend](logits, first, first, everything, weight, 1.0, -1, True, "none")
        has = terms.has_own.to(smooth.dtype) - terms.has_partner.to(smooth.dtype)
        difference = difference + torch.where(has == 0, 0, label_smoothing * has * smooth)
    grad_lam = grad_loss * (difference - mean * change)
    return grad_lam.masked_fill(~terms.has_own & ~terms.has_partner, 0).to(lam.dtype)


def _differentiable_bwd(grad, logits, target, partner, lam, weight, options, reduction):
    """Both gradients by formulas that can be differentiated again."""
    wide = logits.to(lam.dtype)
    operands = (wide, target, partner, lam, weight, *options)
    per_row = grad.expand(len(logits))
    if reduction == "mean":
        terms = target_terms(target, partner, lam, weight, *options[1:])
        total = terms.counted.sum()
        per_row = per_row / total
    grad_logits, grad_lam = reference.mixup_cross_entropy_bwd(per_row, *operands)
    if reduction == "mean":
        mean = reference.mixup_cross_entropy(*operands).sum() / total
        grad_lam = grad_lam - per_row * mean * (terms.own_class_weight - terms.partner_class_weight)
    return grad_logits.to(logits.dtype), grad_lam


def mixup_cross_entropy(
    logits,
    target,
    partner,
    lam,
    weight=None,
    label_smoothing=0.0,
    ignore_index=-100,
    partner_is_class=False,
    reduction="mean",
    *,
    backend=None,
):
    """The loss in the dtype of lam. What the public function checks holds here already.

    Args:
        logits: (N, C), float64, float32, float16 or bfloat16; gets its gradient.
        target: (N,) int64.
        partner: (N,) int64, a permutation, or with partner_is_class the partners' classes.
        lam: (N,) in the accumulation dtype of logits; gets its gradient.
        weight: None, or (C,) in the dtype of lam.
        label_smoothing: A float in [0, 1].
        ignore_index: An int.
        reduction: "mean", "sum" or "none".
        backend: One of `backends.BACKENDS`, or None.
    """
    op = "mixup_cross_entropy"
    chosen = backends.choose_backend(op, backend, op, logits)
    options = (label_smoothing, ignore_index, partner_is_class)
    if chosen != "reference":
        refuse_torch_func(op, chosen)
        operands = distinct(logits, target, partner, lam, weight)
        return _MixupCrossEntropy.apply(chosen, *operands, options, reduction)
    check_mixed_target_on_cpu(op, target, partner, lam, logits.shape[1], ignore_index, partner_is_class)
    with torch.autocast(logits.device.type, enabled=False):
        operands = (logits.to(lam.dtype), target, partner, lam, weight)
        logits, target, partner, lam, weight = map(savable, operands)
        loss = reference.mixup_cross_entropy(logits, target, partner, lam, weight, *options)
        if reduction == "none":
            return loss
        if reduction == "sum":
            return loss.sum()
        return loss.sum() / target_terms(target, partner, lam, weight, *options[1:]).counted.sum()
