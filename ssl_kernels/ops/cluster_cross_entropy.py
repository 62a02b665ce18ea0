"""`cluster_cross_entropy`: views of samples against a teacher's softmax over prototypes, with the gradients in one
pass.

With the student's logits s = scale · <x, y> and the teacher's probabilities q = softmax(<t, u> + bias), a sample's loss
is

    l_n = 1 / P · Σ_(a, v) lse(s_vn) − <q_an, s_vn>        by s_vn:  1 / P · (c_v softmax(s_vn) − Σ_{a: (a, v)} q_an)

over P pairs (a, v), c_v of them with view v. The weights of the samples in what is differentiated are known in the
forward for every reduction but "none", so that gradients are made while a block's logits are there: three products with
the prototypes in all, and nothing of the size of the logits outside of a block.
"""

import torch

from ssl_kernels.chunked import cluster_cross_entropy as chunked
from ssl_kernels.chunked.rows import without_autocast
from ssl_kernels.ops.library import all_savable, library
from ssl_kernels.ops.operation import Operation, has_cpu_kernel, once, overload_of


def _fake(rows, prototypes, scale, rows_of_teacher, columns_of_teacher, biases, weights, views, *options):
    needs = options[-2:]
    grads = (
        x.new_empty(x.shape if need else (0,)) for x, need in zip((rows, prototypes), needs, strict=True)
    )
    return rows.new_empty(rows.shape[0] // views, dtype=torch.float64), *grads, scale.new_empty(())


@without_autocast
def _native(*args):
    """Torch's products with compiled passes over the rows of logits between them."""
    return chunked.in_blocks(torch.ops.ssl_kernels.cluster_rows_.native, *args)


(_run,) = Operation(
    "cluster_cross_entropy",
    chunked,
    {
        "": (
            "(Tensor rows, Tensor prototypes, Tensor scale, Tensor teacher_rows, Tensor teacher_columns,"
            " Tensor? biases, Tensor? weights, int views, int[] pairs, bool normalize_rows,"
            " bool normalize_columns, bool less_entropy, bool rows_need_grad, bool prototypes_need_grad)"
            " -> (Tensor losses, Tensor grad_rows, Tensor grad_prototypes, Tensor grad_scale)",
            _fake,
        )
    },
    chosen_by="contrastive",
).operators
library.define(
    "cluster_rows_.native(Tensor(a!) logits, Tensor(b!) codes, Tensor? biases, int[] pairs, bool differentiate,"
    " bool less_entropy) -> Tensor"
)
library.impl("cluster_cross_entropy.native", _native, "CPU")
_HAS_KERNEL = has_cpu_kernel("cluster_rows_.native")


class _Rows(torch.autograd.Function):
    """(N,) losses. What backward weights them with is not known, so that it makes the logits anew."""

    @staticmethod
    def forward(ctx, caller, chosen, options, rows, prototypes, scale, *teacher):
        run = _run[overload_of(chosen, rows, _HAS_KERNEL)]
        losses = run(rows, prototypes, scale, *teacher, None, *options, False, False)[0]
        ctx.save_for_backward(*all_savable(rows, prototypes, scale, *teacher))
        ctx.caller, ctx.chosen, ctx.options = caller, chosen, options
        return losses

    @staticmethod
    def backward(ctx, grad):
        operands, needs = ctx.saved_tensors, ctx.needs_input_grad[3:6]

        def make(grad):
            return _run[overload_of(ctx.chosen, grad, _HAS_KERNEL)](
                *operands, grad, *ctx.options, *needs[:2]
            )[1:]

        grads = once(ctx.caller, ctx.chosen, needs, make, (grad,), *operands[:3])
        return None, None, None, *grads, None, None, None


class _Weighted(torch.autograd.Function):
    """Σ weight · loss of the samples."""

    @staticmethod
    def forward(ctx, caller, chosen, options, rows, prototypes, scale, *teacher_and_weights):
        *teacher, weights = teacher_and_weights
        needs = ctx.needs_input_grad[3:6]
        wanted = weights if any(needs) else None
        losses, *grads = _run[overload_of(chosen, rows, _HAS_KERNEL)](
            rows, prototypes, scale, *teacher, wanted, *options, *needs[:2]
        )
        ctx.save_for_backward(*all_savable(rows, prototypes, scale, losses, *grads))
        ctx.caller, ctx.chosen = caller, chosen
        return (losses * weights).sum()

    @staticmethod
    def backward(ctx, grad):
        *operands, losses, by_rows, by_prototypes, by_scale = ctx.saved_tensors
        needs = (*ctx.needs_input_grad[3:6], ctx.needs_input_grad[9])

        def make(grad):
            by_operands = (grad.to(by_scale.dtype) * each for each in (by_rows, by_prototypes, by_scale))
            return *(each.to(x.dtype) for each, x in zip(by_operands, operands, strict=True)), grad * losses

        *grads, by_weights = once(ctx.caller, ctx.chosen, needs, make, (grad,), *operands)
        return None, None, None, *grads, None, None, None, by_weights


def cluster_cross_entropy(
    rows,
    prototypes,
    scale,
    teacher,
    pairs,
    weights=None,
    *,
    views,
    normalize_rows,
    normalize_columns,
    less_entropy=False,
    caller,
    chosen,
):
    """Losses of samples, (N,) float64, or with weights (N,) float64 their weighted sum.

    Args:
        rows: (V · N, D), view by view. Gets its gradient, as prototypes, scale and weights do.
        prototypes: (K, D).
        scale: 0-d, in the accumulation dtype of rows.
        teacher: (rows, columns, biases), of the dtype of scale: the teacher's rows (A · N, T), columns (K, T), and
            (A, K), (1, K) or None.
        pairs: (a, v): view v is to have the probabilities of the teacher's view a.
        normalize_rows, normalize_columns: L2-normalise first, as F.normalize does.
        less_entropy: Whether the entropies of the teacher's probabilities are taken off: divergences.
    """
    flat = tuple(number for pair in pairs for number in pair)
    options = views, flat, normalize_rows, normalize_columns, less_entropy
    if weights is None:
        return _Rows.apply(caller, chosen, options, rows, prototypes, scale, *teacher)
    return _Weighted.apply(caller, chosen, options, rows, prototypes, scale, *teacher, weights)
