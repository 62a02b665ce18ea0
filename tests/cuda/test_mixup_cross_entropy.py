"""CUDA kernels of `mixup_cross_entropy`, as nvcc compiled them, against float64."""

import pytest
import torch

from ssl_kernels.reference import mixup_cross_entropy as reference
from tests.cuda.mixing_calls import (
    aligned,
    counted,
    library_of,
    mixup_cross_entropy_bwd,
    mixup_cross_entropy_fwd,
)
from tests.mixing_cases import permutation_of, shares_of

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SECTOR = 32


@pytest.fixture
def library(gpu, nvcc):
    return library_of(gpu, "mixup_cross_entropy")


def call_of(rows, classes, dtype, *, seed=0, spread=3.0, kind="random"):
    """logits, target, permutation, lam and the gradient of the loss."""
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(classes, (rows,), generator=generator)
    grad_loss = torch.randn(rows, generator=generator, dtype=torch.float64)
    return logits, target, permutation_of(kind, rows), shares_of(rows, dtype), grad_loss


def check(library, gpu, call, smoothing=0.0, *, weight=None, ignore_index=-100, direct=False, **options):
    """Against the definition in float64; with `direct` the partners' classes are passed."""
    logits, target, permutation, lam, grad_loss = call
    leaf = logits.double().requires_grad_()
    wide = None if weight is None else weight.double()
    arguments = (leaf, target, permutation, lam.double(), wide, smoothing, ignore_index)
    exact = reference.mixup_cross_entropy(*arguments)
    (exact_grad,) = torch.autograd.grad(exact, leaf, grad_loss)
    counted = reference.target_terms(target, permutation, lam.double(), wide, ignore_index, False).counted
    acc = lam.dtype
    partner = target[permutation] if direct else permutation
    logits, target, partner, lam, grad_loss = (
        tensor.to(gpu.device) for tensor in (logits, target, partner, lam, grad_loss)
    )
    options |= {"ignore_index": ignore_index, "partner_is_class": direct}
    options["weight"] = None if weight is None else weight.to(gpu.device)
    operands = (logits, target, partner, lam)
    loss, lse, found_counted, launches = mixup_cross_entropy_fwd(library, *operands, smoothing, **options)
    # Differences of logits enter, so that their size does not count, but in the mean that smoothing takes.
    largest = 1 if weight is None else max(1, weight.abs().max().item())
    size = 2 + smoothing * leaf.detach().abs().amax(1)
    eps = torch.finfo(acc).eps
    assert ((loss.cpu() - exact.detach()).abs() <= 4 * eps * size * largest).all()
    assert ((found_counted.cpu() - counted).abs() <= eps * largest).all()
    grad, more = mixup_cross_entropy_bwd(library, grad_loss, *operands, lse, smoothing, **options)
    info = torch.finfo(grad.dtype)
    stored = 0 if grad.dtype == acc else info.eps / 2
    of_truth = torch.finfo(torch.float64).eps * leaf.shape[1] ** 0.5  # it sums over the classes
    of_row = (8 * eps * largest + of_truth) * call[-1].abs()[:, None]
    allowed = stored * exact_grad.abs() + of_row + info.smallest_normal * info.eps
    assert ((grad.cpu().double() - exact_grad).abs() <= allowed).all()
    return launches + more


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(library, gpu, dtype, smoothing):
    """Rows of whole vectors, rows off 16 bytes, fewer classes than lanes, more than a batch of accesses."""
    for rows, classes in [(7, 64), (9, 37), (1, 1), (3, 1003)]:
        check(library, gpu, call_of(rows, classes, dtype), smoothing)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows(library, gpu, dtype):
    launches = check(library, gpu, call_of(2, 8200 // dtype.itemsize * 2 + 3, dtype), 0.1)
    if gpu.emulated:
        assert all(launch.grid[0] == 2 and launch.block[0] == 256 for launch in launches)
    check(library, gpu, call_of(3, 5, dtype), 0.1, warps_per_row=8)


@pytest.mark.parametrize("kind", ["identity", "one cycle", "fixed points"])
def test_permutations(library, gpu, kind):
    check(library, gpu, call_of(9, 40, torch.float32, kind=kind))


def test_large_logits(library, gpu):
    """exp(z) would overflow; and float32 holds lse only to 1e-3 there."""
    logits, *rest = call_of(5, 100, torch.float32, spread=10.0)
    check(library, gpu, (logits + 2e4, *rest), 0.1)
    check(library, gpu, (logits * 1e3, *rest), 0.1)


def test_rows_of_a_wider_tensor(library, gpu):
    """Gradient rows are aligned otherwise than those of the logits."""
    logits, target, permutation, lam, grad_loss = call_of(6, 32, torch.float16)
    wide = torch.full((6, 37), torch.nan, dtype=torch.float16)
    wide[:, 3:35] = logits
    logits = wide[:, 3:35]
    check(library, gpu, (logits, target, permutation, lam, grad_loss))


def test_minus_infinity_leaves_a_class_out_and_nan_propagates(library, gpu):
    logits, target, permutation, lam, grad_loss = call_of(4, 9, torch.float32)
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
        call = call_of(rows, classes, dtype)
        call[1][::3] = ignore_index
        weight = None
        if weighted:
            weight = torch.rand(classes, generator=torch.Generator().manual_seed(1)).to(call[3].dtype)
            weight[classes // 2] = 0
        options = {"weight": weight, "ignore_index": ignore_index, "direct": direct}
        check(library, gpu, call, smoothing, **options)
    check(library, gpu, call, smoothing, warps_per_row=8, **options)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_comes_of_what_has_no_weight(library, gpu, smoothing):
    """Not of a row whose classes are to be ignored, whatever it holds, and not of -inf in a class of weight 0."""
    logits, _, _, lam, grad_loss = call_of(4, 40, torch.float32)
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
    logits, _, _, lam, grad_loss = call_of(4, 9, torch.float32)
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
        tensor.to(gpu.device) for tensor in call_of(6, 300, torch.bfloat16)
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
    logits, target, permutation, lam, grad_loss = call_of(32, 1024, dtype)
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
