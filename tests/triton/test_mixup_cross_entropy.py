"""The Triton kernels of `mixup_cross_entropy`, as compiled code, against float64."""

from dataclasses import replace

import pytest
import torch

from ssl_kernels.reference import mixup_cross_entropy as reference
from ssl_kernels.triton import mixup_cross_entropy as kernels
from tests.cuda.mixing_calls import aligned, counted
from tests.helpers import DTYPES
from tests.support.mixing import check_cross_entropy, cross_entropy_call

SECTOR = 32


def run(operands, upstream, smoothing, weight=None, ignore_index=-100, direct=False):
    """Each row's loss, lse and the gradient."""
    options = (smoothing, ignore_index, direct)
    loss, lse, _ = kernels.mixup_cross_entropy_fwd(*operands, weight, *options, "none")
    return loss, kernels.mixup_cross_entropy_bwd(upstream, *operands, weight, lse, *options)


def check(gpu, call, direct=False, **options):
    """With `direct` the partners' classes are passed."""
    partner = call.target[call.permutation] if direct else call.permutation
    *operands, upstream = (
        tensor.to(gpu.device) for tensor in (call.logits, call.target, partner, call.lam, call.grad_loss)
    )
    weight = None if call.weight is None else call.weight.to(gpu.device)
    with gpu.triton(**options):
        loss, grad = run(operands, upstream, call.label_smoothing, weight, call.ignore_index, direct)
    assert loss.dtype == call.lam.dtype
    check_cross_entropy(call, loss, grad)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(gpu, dtype):
    check(gpu, cross_entropy_call(5, 37, dtype, label_smoothing=0.1))
    check(gpu, cross_entropy_call(3, 64, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64_everywhere(gpu, dtype):
    for rows, classes, smoothing in [(1, 1, 0.0), (9, 1003, 0.3), (2, 9000, 1.0)]:
        check(gpu, cross_entropy_call(rows, classes, dtype, label_smoothing=smoothing), seed=rows)


def test_rows_longer_than_a_block(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "LONGEST_BLOCK", 32)
    call = cross_entropy_call(3, 75, torch.float32, label_smoothing=0.1)
    check(gpu, call, seed=2, warp_races=True)


def test_large_logits_and_strides(gpu):
    call = cross_entropy_call(5, 100, torch.float32, spread=10.0, label_smoothing=0.1)
    check(gpu, replace(call, logits=call.logits + 2e4))
    check(gpu, replace(call, logits=call.logits.T.contiguous().T))


@pytest.mark.parametrize(
    "dtype, weighted, direct",
    [(torch.float32, True, False), (torch.float16, True, True), (torch.float32, False, True)],
    ids=str,
)
def test_weights_and_ignored_classes(gpu, dtype, weighted, direct):
    """Rows of which both terms count, one or none, and a class of weight 0; what is ignored is a class, or none."""
    ignored = 3 if direct else 255
    call = cross_entropy_call(9, 37, dtype, ignore_index=ignored)
    call.target[::3] = ignored
    if weighted:
        call.weight = torch.rand(37, generator=torch.Generator().manual_seed(1))
        call.weight[18] = 0
    for smoothing in (0.0, 0.1):
        check(gpu, replace(call, label_smoothing=smoothing), direct)


def test_the_denominator_of_the_mean(gpu):
    logits, target, permutation, lam, _ = cross_entropy_call(6, 9, torch.float32).operands
    target[2] = -100
    weight = torch.linspace(0.5, 2, 9)
    counted = reference.target_terms(target, permutation, lam, weight, -100, False).counted
    with gpu.triton():
        operands = [tensor.to(gpu.device) for tensor in (logits, target, permutation, lam, weight)]
        rows, _, _ = kernels.mixup_cross_entropy_fwd(*operands, 0.1, -100, False, "none")
        mean, _, total = kernels.mixup_cross_entropy_fwd(*operands, 0.1, -100, False, "mean")
    torch.testing.assert_close(total.cpu(), counted.sum())
    torch.testing.assert_close(mean.cpu(), rows.cpu().sum() / counted.sum())


def test_nothing_comes_of_what_has_no_weight(gpu):
    """Not of a row whose classes are to be ignored or out of range, and not of -inf in a class of weight 0."""
    logits, _, _, lam, upstream = cross_entropy_call(6, 9, torch.float32).operands
    logits[0], logits[1, 7], logits[4:, 5] = torch.nan, torch.inf, -torch.inf
    weight = torch.ones(9)
    weight[5] = 0
    target = torch.tensor([-100, 9, -1, 2**32 + 1, 3, 5])
    partners = torch.tensor([-100, 9, -1, 2**32 + 2, -100, 4])
    permutation = torch.tensor([0, 6, -1, 2**32 + 4, 3, 4])
    for smoothing in (0.0, 0.1):
        for partner, direct in ((partners, True), (permutation, False)):
            operands = [tensor.to(gpu.device) for tensor in (logits, target, partner, lam.fill_(0.5))]
            with gpu.triton():
                loss, grad = run(
                    operands, upstream.to(gpu.device), smoothing, weight.to(gpu.device), -100, direct
                )
            assert (loss[:4] == 0).all() and loss.isfinite().all()
            assert (grad[:4] == 0).all() and grad.isfinite().all()
            assert (grad[4:].abs().sum(1) > 0).all()


def test_logits_are_read_once_in_each_pass(gpu):
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    logits, target, permutation, lam, grad_loss = cross_entropy_call(8, 1024, torch.float32).operands
    logits = aligned(logits)
    with gpu.triton() as launches:
        run((logits, target, permutation, lam), grad_loss, 0.1)
    minimum = logits.nbytes // SECTOR
    few = 8 * 4 * 12  # what every warp reads of its row's numbers
    assert minimum <= counted(launches, "loss_kernel").global_load_sectors <= 1.02 * minimum + few
    backward = counted(launches, "grad_kernel")
    assert minimum <= backward.global_load_sectors <= 1.02 * minimum + few
    assert minimum <= backward.global_store_sectors <= 1.1 * minimum
