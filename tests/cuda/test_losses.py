"""Every loss, down to the CUDA kernels as nvcc compiled them."""

from functools import partial

import pytest
import torch

from ssl_kernels.ops import batch_hard, contrastive, row_pairs, sigmoid_pairs
from tests.cuda import batch_hard_calls, sigmoid_pairs_calls
from tests.cuda.contrastive_calls import Fwd, contrastive_bwd, contrastive_fwd
from tests.cuda.row_pairs_calls import row_pairs_bwd, row_pairs_fwd
from tests.losses.emulated import cases, check_edge, check_loss, check_moco, edges, run_on
from tests.support import sigmoid_pairs as pairs
from tests.support.contrastive import Call


@pytest.fixture
def operators(library_of):
    pairs = library_of("row_pairs.cu")
    return {
        **contrastive_operators(library_of),
        (row_pairs, "_fwd"): lambda *args: row_pairs_fwd(pairs, *args)[0],
        (row_pairs, "_bwd"): lambda *args: tuple(row_pairs_bwd(pairs, *args)[0]),
        (sigmoid_pairs, "_fwd"): partial(sigmoid_forward, library_of("sigmoid_pairs.cu")),
        (sigmoid_pairs, "_bwd"): partial(sigmoid_backward, library_of("sigmoid_pairs.cu")),
        (batch_hard, "_mine"): partial(mine, library_of("batch_hard.cu")),
    }


def contrastive_operators(library_of):
    tiles = library_of("contrastive_additions.cu", "contrastive.cu")
    return {(contrastive, "_fwd"): partial(forward, tiles), (contrastive, "_bwd"): partial(backward, tiles)}


@cases
def test_loss_is_its_definition(operators, gpu, case, monkeypatch):
    run_on(monkeypatch, operators)
    check_loss(case, gpu.device)


@edges
def test_loss_at_an_edge(operators, gpu, edge, monkeypatch):
    run_on(monkeypatch, operators)
    check_edge(edge, gpu.device, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pushes", [(30,), (50, 60, 7)], ids=["half-filled", "wrapped"])
def test_moco_against_a_queue(library_of, gpu, monkeypatch, dtype, pushes):
    check_moco(monkeypatch, gpu.device, dtype, pushes, contrastive_operators(library_of))


def forward(library, *args):
    """The operator `contrastive_fwd` over the launchers."""
    operands, (keep, columns_need_grad), additions = args[:10], args[10:12], args[12:]
    call = _call(*operands, *additions)
    expectation = keep and call.columns is not None and not columns_need_grad and not call.both_directions
    results, _ = contrastive_fwd(library, call, expectation=expectation)
    empty = call.rows.new_empty(0)
    lse, column_lse, positive_logits, row_rnorm, column_rnorm, kept = (
        empty if result is None else result for result in results
    )
    if operands[3] is not None:
        positive_logits = positive_logits.view(operands[3].shape)
    return lse, column_lse, positive_logits, row_rnorm, column_rnorm, kept


def backward(library, grad_lse, grad_column_lse, grad_positive_logits, *args):
    """The operator `contrastive_bwd` over the launchers."""
    operands, saved, flags, needed, additions = args[:6], args[6:11], args[11:15], args[15:17], args[17:]
    call = _call(*operands, *flags, *additions[:5])
    saved = [tensor if tensor.numel() else None for tensor in saved]
    if grad_positive_logits is not None:
        grad_positive_logits = grad_positive_logits.contiguous().view(call.positives.shape)
    grads = [None if grad is None else grad.contiguous() for grad in (grad_lse, grad_column_lse)]
    lse, column_lse, row_rnorm, column_rnorm, kept = saved
    fwd = Fwd(lse, column_lse, None, row_rnorm, column_rnorm, kept)
    results, _ = contrastive_bwd(
        library,
        call,
        fwd,
        *grads,
        grad_positive_logits,
        rows_need_grad=needed[0],
        columns_need_grad=needed[1],
        biases_need_grad=any(additions[5:]),
    )
    empty = call.rows.new_empty(0)
    return tuple(empty if result is None else result for result in results)


def _call(rows, columns, scale, positives, *others):
    positives = None if positives is None else positives.view(len(rows), -1).contiguous()
    return Call(rows, columns, scale, positives, *others)


def sigmoid_forward(library, *args):
    """The operator `sigmoid_pairs_fwd` over the launchers."""
    (total, keep, *needed), ids = args[7:11], args[11:]
    call = pairs.Call(*args[:7], *ids)
    empty = call.scale.new_empty(0)
    if not (total and keep):
        return sigmoid_pairs_calls.losses(library, call, total=total)[0], *[empty] * 4
    losses, grads, _ = sigmoid_pairs_calls.total_with_gradients(library, call, needed=needed)
    return losses, *(empty if grad is None else grad for grad in grads)


def sigmoid_backward(library, grad_losses, *args):
    """The operator `sigmoid_pairs_bwd` over the launchers."""
    needed, ids = args[7:9], args[9:]
    call = pairs.Call(*args[:7], *ids)
    grads, _ = sigmoid_pairs_calls.weighted_gradients(library, call, grad_losses.contiguous(), needed=needed)
    return tuple(call.scale.new_empty(0) if grad is None else grad for grad in grads)


def mine(library, embeddings, labels, normalize, distance):
    """The operator `batch_hard` over the launcher."""
    return batch_hard_calls.batch_hard(library, embeddings, labels, normalize, distance)[0]
