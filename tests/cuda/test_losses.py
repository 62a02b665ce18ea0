"""The losses over `contrastive` and `row_pairs`, down to the CUDA kernels as nvcc compiled them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from ssl_kernels import backends, moco_loss
from ssl_kernels.nn import MoCoQueue
from ssl_kernels.ops import contrastive, row_pairs
from tests.cuda.contrastive_calls import Call, Fwd, contrastive_bwd, contrastive_fwd
from tests.cuda.row_pairs_calls import row_pairs_bwd, row_pairs_fwd
from tests.helpers import random_rows
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("pushes", [(30,), (50, 60, 7)], ids=["half-filled", "wrapped"])
def test_moco_against_a_queue(library_of, gpu, monkeypatch, dtype, pushes):
    """float32 queries, symmetric, with the keys pushed before backward and rows told apart by ids as on CUDA."""
    queue, device = MoCoQueue(80, 24, dtype), gpu.device
    for seed, count in enumerate(pushes):
        queue.push_(random_rows(count, 24, seed=seed))
    negatives = queue.keys.double()
    query, key = (random_rows(20, 24, seed=seed) for seed in (7, 8))
    wide = query.double().requires_grad_()
    unit, positive = F.normalize(wide, dim=1), F.normalize(key.double(), dim=1).roll(10, 0)
    logits = torch.cat(((unit * positive).sum(1, keepdim=True), unit @ negatives.T), 1) / 0.07
    truth = F.cross_entropy(logits, torch.zeros(20, dtype=torch.int64))
    truth.backward()

    queue.to(device)
    query = query.to(device).requires_grad_()
    operators = {"contrastive": "triton"}
    for name, run in (("_fwd", forward), ("_bwd", backward)):
        monkeypatch.setitem(getattr(contrastive, name), "triton", partial(run, library_of("contrastive.cu")))
    monkeypatch.setattr(backends, "choose_backend", lambda op, *_, **__: operators.get(op, "chunked"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the fill count is not read
    loss = moco_loss(query, key.to(device), queue, 0.07, symmetric=True)
    queue.push_(key.to(device))
    loss.backward()
    torch.testing.assert_close(loss.detach().cpu().double(), truth.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(query.grad.cpu().double(), wide.grad, rtol=1e-4, atol=1e-6)


def forward(library, *args):
    """The operator `contrastive_fwd` over the launchers."""
    operands, (keep, columns_need_grad) = args[:10], args[10:]
    call = _call(*operands)
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
    operands, saved, flags = args[:6], args[6:11], args[11:15]
    call = _call(*operands, *flags)
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
        rows_need_grad=args[15],
        columns_need_grad=args[16],
    )
    empty = call.rows.new_empty(0)
    return tuple(empty if result is None else result for result in results)


def _call(rows, columns, scale, positives, *others):
    positives = None if positives is None else positives.view(len(rows), -1).contiguous()
    return Call(rows, columns, scale, positives, *others)
