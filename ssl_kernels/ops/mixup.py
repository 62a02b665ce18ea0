"""`mixup_`, `mixup_fwd` and `mixup_bwd`: samples mixed with their partners. docs/mixing.md has the contract."""

import torch

from ssl_kernels import backends
from ssl_kernels.checks import check_on_cpu
from ssl_kernels.chunked import mixing as chunked
from ssl_kernels.ops.library import accumulation_dtype, refuse_torch_func, savable
from ssl_kernels.ops.operation import Operation
from ssl_kernels.reference import mixup as reference


def _bwd_fake(grad, x, lam, permutation, x_needs_grad):
    grad_x = torch.empty_like(grad) if x_needs_grad else grad.new_empty(0)
    return grad_x, lam.new_empty(0 if x is None else lam.shape)


_operation = Operation(
    "mixup",
    chunked,
    {
        "_": ("(Tensor(a!) x, Tensor lam, Tensor permutation) -> ()", lambda *_: None),
        "_fwd": ("(Tensor x, Tensor lam, Tensor permutation) -> Tensor", lambda x, *_: torch.empty_like(x)),
        "_bwd": (
            "(Tensor grad, Tensor? x, Tensor lam, Tensor permutation, bool x_needs_grad)"
            " -> (Tensor grad_x, Tensor grad_lam)",
            _bwd_fake,
        ),
    },
)
_in_place, _fwd, _bwd = _operation.operators


class _Mixup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, lam, permutation):
        _, x_needs_grad, lam_needs_grad, _ = ctx.needs_input_grad
        ctx.backend, ctx.x_needs_grad = backend, x_needs_grad
        ctx.save_for_backward(*map(savable, (x if lam_needs_grad else None, lam, permutation)))
        return _fwd[backend](x, lam, permutation)

    @staticmethod
    def backward(ctx, grad):
        x, lam, permutation = ctx.saved_tensors
        if torch.is_grad_enabled():  # formulas that can be differentiated again
            acc = lam.dtype
            grad_x, grad_lam = reference.mixup_bwd(
                grad.to(acc), None if x is None else x.to(acc), lam, permutation
            )
            grad_x = grad_x.to(grad.dtype)
        else:
            grad_x, grad_lam = _bwd[ctx.backend](grad, x, lam, permutation, ctx.x_needs_grad)
        return None, grad_x if ctx.x_needs_grad else None, None if x is None else grad_lam, None


def mixup_(x, lam, permutation, *, backend=None):
    """λ_i x_i + (1 − λ_i) x_p(i) in place. What the public function checks holds here already.

    Args:
        x: (B, ...), float64, float32, float16 or bfloat16.
        lam: (B,) in the accumulation dtype of x.
        permutation: (B,) int64.
        backend: One of `backends.BACKENDS`, or None.
    """
    chosen = backends.choose_backend("mixup", backend, "mixup_", x)
    if chosen == "reference":
        check_on_cpu("mixup_", permutation, lam)
        x.copy_(reference.mixup(x.to(lam.dtype), lam, permutation))
    else:
        _in_place[chosen](x, lam, permutation)


def mixup(x, lam, permutation, *, backend=None):
    """As `mixup_`, into a new tensor, differentiable by x and lam as often as wanted."""
    chosen = backends.choose_backend("mixup", backend, "mixup", x)
    if chosen == "reference":
        check_on_cpu("mixup", permutation, lam)
        acc = accumulation_dtype(x)
        return reference.mixup(*map(savable, (x.to(acc), lam, permutation))).to(x.dtype)
    refuse_torch_func("mixup", chosen)
    return _Mixup.apply(chosen, x, lam, permutation)
