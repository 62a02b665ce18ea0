"""The losses over `contrastive` and `row_pairs`, down to the CUDA kernels as nvcc compiled them."""

from functools import partial

from ssl_kernels.ops import contrastive, row_pairs
from tests.cuda.contrastive_calls import Call, Fwd, contrastive_bwd, contrastive_fwd
from tests.cuda.row_pairs_calls import row_pairs_bwd, row_pairs_fwd
from tests.losses.emulated import cases, check_loss, run_on


@cases
def test_loss_is_its_definition(library_of, gpu, case, monkeypatch):
    tiles, pairs = library_of("contrastive.cu"), library_of("row_pairs.cu")
    operators = {
        contrastive: (partial(forward, tiles), partial(backward, tiles)),
        row_pairs: (
            lambda *args: row_pairs_fwd(pairs, *args)[0],
            lambda *args: tuple(row_pairs_bwd(pairs, *args)[0]),
        ),
    }
    run_on(monkeypatch, operators)
    check_loss(case, gpu.device)


def forward(library, *args):
    """The operator `contrastive_fwd` over the launchers."""
    operands = args[:10]  # all but the two that say what may be kept: nothing is
    call = _call(*operands)
    results, _ = contrastive_fwd(library, call)
    empty = call.rows.new_empty(0)
    lse, column_lse, positive_logits, row_rnorm, column_rnorm, _ = (
        empty if result is None else result for result in results
    )
    if operands[3] is not None:
        positive_logits = positive_logits.view(operands[3].shape)
    return lse, column_lse, positive_logits, row_rnorm, column_rnorm, empty


def backward(library, grad_lse, grad_column_lse, grad_positive_logits, *args):
    """The operator `contrastive_bwd` over the launchers."""
    operands, saved, flags = args[:6], args[6:11], args[11:15]
    call = _call(*operands, *flags)
    saved = [tensor if tensor.numel() else None for tensor in saved]
    if grad_positive_logits is not None:
        grad_positive_logits = grad_positive_logits.contiguous().view(call.positives.shape)
    grads = [None if grad is None else grad.contiguous() for grad in (grad_lse, grad_column_lse)]
    lse, column_lse, row_rnorm, column_rnorm, _ = saved
    fwd = Fwd(lse, column_lse, None, row_rnorm, column_rnorm, None)
    results, _ = contrastive_bwd(
        library,
        call,
        fwd,
        *grads,
        grad_positive_logits,
        rows_need_grad=args[15],
        columns_need_grad=args[16],
    )
    empty = call.rows.new_empty(0)
    return tuple(empty if result is None else result for result in results)


def _call(rows, columns, scale, positives, *others):
    positives = None if positives is None else positives.view(len(rows), -1).contiguous()
    return Call(rows, columns, scale, positives, *others)
