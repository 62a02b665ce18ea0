"""CUDA kernels of `mixup_cross_entropy`, as nvcc compiled them, against float64."""

from dataclasses import replace

import pytest
import torch

from tests.cuda.mixing_calls import (
    aligned,
    counted,
    library_of,
    mixup_cross_entropy_bwd,
    mixup_cross_entropy_fwd,
)
from tests.support.mixing import check_cross_entropy, cross_entropy_call

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SECTOR = 32


@pytest.fixture
def library(gpu, nvcc):
    return library_of(gpu, "mixup_cross_entropy")


def check(library, gpu, call, *, direct=False, **options):
    """With `direct` the partners' classes are passed."""
    partner = call.target[call.permutation] if direct else call.permutation
    operands = [tensor.to(gpu.device) for tensor in (call.logits, call.target, partner, call.lam)]
    options |= {"ignore_index": call.ignore_index, "partner_is_class": direct}
    options["weight"] = None if call.weight is None else call.weight.to(gpu.device)
    smoothing, grad_loss = call.label_smoothing, call.grad_loss.to(gpu.device)
    loss, lse, counted, launches = mixup_cross_entropy_fwd(library, *operands, smoothing, **options)
    grad, more = mixup_cross_entropy_bwd(library, grad_loss, *operands, lse, smoothing, **options)
    check_cross_entropy(call, loss, grad, counted=counted)
    return launches + more


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(library, gpu, dtype, smoothing):
    """Rows of whole vectors, rows off 16 bytes, fewer classes than lanes, more than a batch of accesses."""
    for rows, classes in [(7, 64), (9, 37), (1, 1), (3, 1003)]:
        check(library, gpu, cross_entropy_call(rows, classes, dtype, label_smoothing=smoothing))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows(library, gpu, dtype):
    launches = check(
        library, gpu, cross_entropy_call(2, 8200 // dtype.itemsize * 2 + 3, dtype, label_smoothing=0.1)
    )
    if gpu.emulated:
        assert all(launch.grid[0] == 2 and launch.block[0] == 256 for launch in launches)
    check(library, gpu, cross_entropy_call(3, 5, dtype, label_smoothing=0.1), warps_per_row=8)


@pytest.mark.parametrize("kind", ["identity", "one cycle", "fixed points"])
def test_permutations(library, gpu, kind):
    check(library, gpu, cross_entropy_call(9, 40, torch.float32, kind=kind))


def test_large_logits(library, gpu):
    """exp(z) would overflow; and float32 holds lse only to 1e-3 there."""
    call = cross_entropy_call(5, 100, torch.float32, spread=10.0, label_smoothing=0.1)
    check(library, gpu, replace(call, logits=call.logits + 2e4))
    check(library, gpu, replace(call, logits=call.logits * 1e3))


def test_rows_of_a_wider_tensor(library, gpu):
    """Gradient rows are aligned otherwise than those of the logits."""
    call = cross_entropy_call(6, 32, torch.float16)
    wide = torch.full((6, 37), torch.nan, dtype=torch.float16, device=gpu.device)
    wide[:, 3:35] = call.logits
    check(library, gpu, replace(call, logits=wide[:, 3:35]))


def test_minus_infinity_leaves_a_class_out_and_nan_propagates(library, gpu):
    logits, target, permutation, lam, grad_loss = cross_entropy_call(4, 9, torch.float32).operands
    target[:] = 2
    logits[0, 5] = -torch.inf
    logits[1, 3] = torch.nan
    arguments = [tensor.to(gpu.device) for tensor in (logits, target, permutation, lam)]
    loss, lse, _, _ = mixup_cross_entropy_fwd(library, *arguments)
    assert loss.isnan().tolist() == [False, True, False, False]
    exact = torch.logsumexp(logits.double(), 1) - logits[:, 2].double()
    torch.testing.assert_close(loss[0].cpu(), exact[0], rtol=0, atol=1e-6)
    grad, _ = mixup_cross_entropy_bwd(library, grad_loss.to(gpu.device), *arguments, lse)
    assert grad[0, 5] == 0 and grad[0].isfinite().all() and grad[1].isnan().all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_and_ignored_classes(library, gpu, dtype, weighted, smoothing):
    """Rows of which both terms count, one or none, and classes of weight 0."""
    for rows, classes, ignore_index, direct in [
        (7, 64, -100, False),
        (9, 37, 3, True),
        (5, 1003, 2**40, False),
    ]:
        call = cross_entropy_call(rows, classes, dtype, label_smoothing=smoothing, ignore_index=ignore_index)
        call.target[::3] = ignore_index
        if weighted:
            call.weight = torch.rand(classes, generator=torch.Generator().manual_seed(1)).to(call.lam.dtype)
            call.weight[classes // 2] = 0
        check(library, gpu, call, direct=direct)
    check(library, gpu, call, warps_per_row=8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_comes_of_what_has_no_weight(library, gpu, smoothing):
    """Not of a row whose classes are to be ignored, whatever it holds, and not of -inf in a class of weight 0."""
    logits, _, _, lam, grad_loss = cross_entropy_call(4, 40, torch.float32).operands
    logits[0], logits[1, 7], logits[2:, 5] = torch.nan, torch.inf, -torch.inf
    weight = torch.ones(40)
    weight[5] = 0
    target, partner = torch.tensor([-100, -100, 3, 5]), torch.tensor([-100, -100, -100, 4])
    arguments = [tensor.to(gpu.device) for tensor in (logits, target, partner, lam.fill_(0.5))]
    options = {"weight": weight.to(gpu.device), "partner_is_class": True}
    loss, lse, counted, _ = mixup_cross_entropy_fwd(library, *arguments, smoothing, **options)
    assert (loss[:2] == 0).all() and loss.isfinite().all() and counted.tolist() == [0, 0, 0.5, 0.5]
    grad, _ = mixup_cross_entropy_bwd(
        library, grad_loss.to(gpu.device), *arguments, lse, smoothing, **options
    )
    assert (grad[:2] == 0).all() and grad.isfinite().all()


def test_targets_outside_the_classes_have_no_weight(library, gpu):
    logits, _, _, lam, grad_loss = cross_entropy_call(4, 9, torch.float32).operands
    target = torch.tensor([9, -1, 2**40, 3], device=gpu.device)
    permutation = torch.tensor([4, -1, 2**40, 3], device=gpu.device)
    logits, lam, grad_loss = (tensor.to(gpu.device) for tensor in (logits, lam, grad_loss))
    weight = torch.ones(9, device=gpu.device)
    for partner, options in [
        (permutation, {}),
        (target, {"partner_is_class": True}),
        (permutation, {"weight": weight}),
        (target, {"weight": weight, "partner_is_class": True}),
    ]:
        operands = (logits, target, partner, lam)
        loss, lse, counted, _ = mixup_cross_entropy_fwd(library, *operands, 0.1, **options)
        assert (loss[:3] == 0).all() and loss[3] > 0 and (counted[:3] == 0).all()
        grad, _ = mixup_cross_entropy_bwd(library, grad_loss, *operands, lse, 0.1, **options)
        assert (grad[:3] == 0).all() and grad[3].abs().sum() > 0


@pytest.mark.parametrize("warps", [1, 8])
def test_every_schedule_gives_the_same_bits_and_can_be_captured(library, gpu, warps):
    logits, target, permutation, lam, grad_loss = (
        tensor.to(gpu.device) for tensor in cross_entropy_call(6, 300, torch.bfloat16).operands
    )
    results = []
    for options in ({}, {"seed": 1, "capturing": True, "stream": 7}, {"seed": 2, "warp_races": True}):
        if not gpu.emulated:
            options = {}
        options["warps_per_row"] = warps
        loss, lse, _, launches = mixup_cross_entropy_fwd(
            library, logits, target, permutation, lam, 0.1, **options
        )
        grad, more = mixup_cross_entropy_bwd(
            library, grad_loss, logits, target, permutation, lam, lse, 0.1, **options
        )
        assert {launch.stream for launch in [*launches, *more]} <= {options.get("stream", 0)}
        results.append((loss, lse, grad))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_read_once_in_each_pass(library, gpu, dtype):
    """Sectors within 10 % of the minimum, in 16-byte accesses."""
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    logits, target, permutation, lam, grad_loss = cross_entropy_call(32, 1024, dtype).operands
    logits, grad = aligned(logits), aligned(torch.zeros_like(logits))
    minimum = logits.nbytes // SECTOR
    _, lse, _, launches = mixup_cross_entropy_fwd(library, logits, target, permutation, lam, 0.1)
    counters = counted(launches, "loss_kernel")
    assert minimum <= counters.global_load_sectors <= 1.1 * minimum
    _, launches = mixup_cross_entropy_bwd(
        library, grad_loss, logits, target, permutation, lam, lse, 0.1, grad_logits=grad
    )
    counters = counted(launches, "grad_kernel")
    assert minimum <= counters.global_load_sectors <= 1.1 * minimum
    assert counters.global_store_sectors == minimum and counters.global_store_requests == minimum // 16
