"""Σ_j p_ij <x_i, y_j> under the softmax p of other rows and columns, over the streamed tiles of `contrastive`.

`contrastive` gives the gradient of a log-sum-exp by its rows: the expectation of the columns under the softmax. With
the teacher's rows and columns made wider, by zeros on one side and by the pupil's on the other, the logits stay the
teacher's, and the expectation has the pupil's columns as well: rows [t, 0] and columns [u, y] give Σ_j p_ij y_j, and
rows [t, x] with columns [u, 0] the gradient of those dots by y.
"""

import torch

from ssl_kernels.ops.contrastive import backward_of, forward_of
from ssl_kernels.ops.operation import once


class TeacherDots(torch.autograd.Function):
    """dots (N,) and Σ_j p_ij log p_ij (N,), float64: of unit rows x, y and the teacher's t, u, whose logits are <t, u>.

    Only x and y have gradients.
    """

    @staticmethod
    def forward(ctx, backend, x, y, t, u):
        width = t.shape[1]
        rows = torch.cat((t, torch.zeros_like(x)), 1)
        columns = torch.cat((u, y), 1)
        results = forward_of(backend, rows, columns, keep=True)
        lse = results[0]
        ones = torch.ones_like(lse)
        expectation = backward_of(backend, ones, rows, columns, results, rows_need_grad=True)[0]
        dots = (x * expectation[:, width:]).sum(1, dtype=torch.float64)
        minus_entropy = (t * expectation[:, :width]).sum(1, dtype=torch.float64) - lse
        ctx.save_for_backward(x, t, u, lse, expectation[:, width:])
        ctx.backend = backend
        ctx.mark_non_differentiable(minus_entropy)
        return dots, minus_entropy

    @staticmethod
    def backward(ctx, grad_dots, _):
        x, t, u, lse, expectation = ctx.saved_tensors
        needs = x_needs_grad, y_needs_grad = ctx.needs_input_grad[1:3]

        def make(grad_dots):
            grad_x = grad_dots.to(x.dtype)[:, None] * expectation if x_needs_grad else x.new_empty(0)
            if not y_needs_grad:
                return grad_x, x.new_empty(0)
            rows, columns = torch.cat((t, x), 1), torch.cat((u, u.new_zeros(len(u), x.shape[1])), 1)
            nothing = [lse, lse.new_empty(0), lse.new_empty(0), *[x.new_empty(0) for _ in range(3)]]
            grad_columns = backward_of(
                ctx.backend, grad_dots, rows, columns, nothing, columns_need_grad=True
            )[1]
            return grad_x, grad_columns[:, t.shape[1] :].contiguous()

        return None, *once("teacher_dots", ctx.backend, needs, make, (grad_dots,), x), None, None


def teacher_dots(backend, x, y, t, u):
    """`TeacherDots` of a backend other than the reference."""
    return TeacherDots.apply(backend, x, y, t, u)
