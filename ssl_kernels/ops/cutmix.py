"""`cutmix_`, `cutmix_fwd` and `cutmix_bwd`: a box of each sample from its partner. docs/mixing.md has the contract."""

import torch

from ssl_kernels import backends
from ssl_kernels.checks import check_on_cpu
from ssl_kernels.chunked import mixing as chunked
from ssl_kernels.ops.library import accumulation_dtype, refuse_torch_func, savable
from ssl_kernels.ops.operation import Operation
from ssl_kernels.reference import cutmix as reference

_operation = Operation(
    "cutmix",
    chunked,
    {
        "_": ("(Tensor(a!) x, Tensor boxes, Tensor permutation) -> ()", lambda *_: None),
        "_fwd": ("(Tensor x, Tensor boxes, Tensor permutation) -> Tensor", lambda x, *_: torch.empty_like(x)),
        "_bwd": (
            "(Tensor grad, Tensor boxes, Tensor permutation) -> Tensor",
            lambda grad, *_: torch.empty_like(grad),
        ),
    },
)
_in_place, _fwd, _bwd = _operation.operators


class _CutMix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, x, boxes, permutation):
        ctx.backend = backend
        ctx.save_for_backward(*map(savable, (boxes, permutation)))
        return _fwd[backend](x, boxes, permutation)

    @staticmethod
    def backward(ctx, grad):
        boxes, permutation = ctx.saved_tensors
        if torch.is_grad_enabled():  # a formula that can be differentiated again
            wide = grad.to(accumulation_dtype(grad))
            grad_x = reference.cutmix_bwd(wide, boxes, permutation).to(grad.dtype)
        else:
            grad_x = _bwd[ctx.backend](grad, boxes, permutation)
        return None, grad_x, None, None


def cutmix_(x, boxes, permutation, *, backend=None):
    """Paste in place. What the public function checks holds here already.

    Args:
        x: (B, ..., H, W).
        boxes: (B, 4) int64, rows (y0, y1, x0, x1).
        permutation: (B,) int64.
        backend: One of `backends.BACKENDS`, or None.
    """
    chosen = backends.choose_backend("cutmix", backend, "cutmix_", x)
    if chosen == "reference":
        check_on_cpu("cutmix_", permutation, boxes=boxes, image=x.shape[-2:])
        x.copy_(reference.cutmix(x, boxes, permutation))
    else:
        _in_place[chosen](x, boxes, permutation)


def cutmix(x, boxes, permutation, *, backend=None):
    """As `cutmix_`, into a new tensor, differentiable by x as often as wanted."""
    chosen = backends.choose_backend("cutmix", backend, "cutmix", x)
    if chosen == "reference":
        check_on_cpu("cutmix", permutation, boxes=boxes, image=x.shape[-2:])
        return reference.cutmix(x, boxes, savable(permutation))
    refuse_torch_func("cutmix", chosen)
    return _CutMix.apply(chosen, x, boxes, permutation)
