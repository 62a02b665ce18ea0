"""`view_cross_entropy`: `cluster_cross_entropy` of views whose logits their user has.

Nothing of the size of the logits is kept beside them: backward makes the softmaxes anew.
"""

import torch

from ssl_kernels.chunked import view_cross_entropy as chunked
from ssl_kernels.ops.library import accumulation_dtype, all_savable
from ssl_kernels.ops.operation import Operation, has_cpu_kernel, once, overload_of

_OPERANDS = "Tensor[] student, Tensor[] teacher, Tensor scale, Tensor steepness, Tensor? bias, int[] pairs"


def _fwd_fake(student, teacher, scale, steepness, bias, pairs):
    return student[0].new_empty(student[0].shape[0], dtype=torch.float64)


def _bwd_fake(weights, student, teacher, scale, steepness, bias, pairs, needs):
    grads = [x.new_empty(x.shape if need else (0,)) for x, need in zip(student, needs[:-1], strict=True)]
    return [*grads, student[0].new_empty((), dtype=accumulation_dtype(student[0]))]


_fwd, _bwd = Operation(
    "view_cross_entropy",
    chunked,
    {
        "_fwd": (f"({_OPERANDS}) -> Tensor", _fwd_fake),
        "_bwd": (f"(Tensor weights, {_OPERANDS}, int[] needs) -> Tensor[]", _bwd_fake),
    },
    chosen_by="contrastive",
).operators
_HAS_KERNEL = has_cpu_kernel("view_cross_entropy_fwd.native")


class _ViewCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, caller, chosen, pairs, students, scale, steepness, bias, *views):
        overload = overload_of(chosen, scale, _HAS_KERNEL)
        losses = _fwd[overload](views[:students], views[students:], scale, steepness, bias, pairs)
        ctx.save_for_backward(*all_savable(scale, steepness, bias, *views))
        ctx.caller, ctx.chosen, ctx.overload = caller, chosen, overload
        ctx.pairs, ctx.students = pairs, students
        return losses

    @staticmethod
    def backward(ctx, grad):
        scale, steepness, bias, *views = ctx.saved_tensors
        student, teacher = views[: ctx.students], views[ctx.students :]
        needs = (*ctx.needs_input_grad[7 : 7 + ctx.students], ctx.needs_input_grad[4])

        def make(grad):
            given = (grad, student, teacher, scale, steepness, bias, ctx.pairs, [int(need) for need in needs])
            return tuple(_bwd[ctx.overload](*given))

        *grads, by_scale = once(ctx.caller, ctx.chosen, needs, make, (grad,), scale, *views)
        return None, None, None, None, by_scale, None, None, *grads, *[None] * len(teacher)


def view_cross_entropy(student, scale, teacher, steepness, bias, pairs, *, caller, chosen):
    """Sums over the pairs (a, v) of the cross-entropies of samples, (N,) float64.

    Args:
        student: V tensors (N, K), which get their gradients.
        scale: 0-d in the accumulation dtype, of the student's logits. Gets its gradient.
        teacher: A tensors (N, K) with the probabilities softmax(steepness · t + bias), without gradient.
        steepness, bias: 0-d, and (K,) or None.
    """
    acc = accumulation_dtype(student[0])
    if any((view.dtype == torch.float64) != (acc == torch.float64) for view in teacher):
        teacher = [view.to(acc) for view in teacher]
    flat = tuple(number for pair in pairs for number in pair)
    return _ViewCrossEntropy.apply(
        caller, chosen, flat, len(student), scale, steepness, bias, *student, *teacher
    )
