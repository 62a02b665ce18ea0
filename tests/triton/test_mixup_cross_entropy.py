"""The Triton kernels of `mixup_cross_entropy`, as compiled code, against float64."""

import pytest
import torch

from ssl_kernels.reference import mixup_cross_entropy as reference
from ssl_kernels.triton import mixup_cross_entropy as kernels
from tests.cuda.mixing_calls import aligned, counted
from tests.mixing_cases import permutation_of, shares_of
from tests.triton.cases import DTYPES

SECTOR = 32


def call_of(rows, classes, dtype, *, seed=0, spread=3.0):
    """logits, target, permutation, lam and the gradient of the loss."""
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(rows, classes, generator=generator, dtype=torch.float64)).to(dtype)
    target = torch.randint(classes, (rows,), generator=generator)
    grad_loss = torch.randn(rows, generator=generator, dtype=torch.float64)
    return logits, target, permutation_of("random", rows), shares_of(rows, dtype), grad_loss


def run(operands, upstream, smoothing, weight=None, ignore_index=-100, direct=False):
    """Each row's loss, lse and the gradient."""
    options = (smoothing, ignore_index, direct)
    loss, lse, _ = kernels.mixup_cross_entropy_fwd(*operands, weight, *options, "none")
    return loss, kernels.mixup_cross_entropy_bwd(upstream, *operands, weight, lse, *options)


def check(gpu, call, smoothing=0.0, weight=None, ignore_index=-100, direct=False, **options):
    """Against the definition in float64; with `direct` the partners' classes are passed."""
    logits, target, permutation, lam, grad_loss = call
    leaf = logits.double().requires_grad_()
    wide = None if weight is None else weight.double()
    exact = reference.mixup_cross_entropy(
        leaf, target, permutation, lam.double(), wide, smoothing, ignore_index
    )
    (exact_grad,) = torch.autograd.grad(exact, leaf, grad_loss)
    partner = target[permutation] if direct else permutation
    *operands, upstream = (tensor.to(gpu.device) for tensor in (logits, target, partner, lam, grad_loss))
    with gpu.triton(**options) as launches:
        weights = None if weight is None else weight.to(gpu.device)
        loss, grad = run(operands, upstream, smoothing, weights, ignore_index, direct)
    # Differences of logits enter, so that their size does not count, but in the mean that smoothing takes.
    largest = 1 if weight is None else max(1, weight.abs().max().item())
    size = largest * (2 + smoothing * leaf.detach().abs().amax(1))
    eps = torch.finfo(lam.dtype).eps
    assert loss.dtype == lam.dtype
    assert ((loss.cpu().double() - exact.detach()).abs() <= 4 * eps * size + eps * exact.detach()).all()
    info = torch.finfo(grad.dtype)
    stored = 0 if grad.dtype == lam.dtype else info.eps / 2
    of_truth = torch.finfo(torch.float64).eps * logits.shape[1] ** 0.5  # it sums over the classes
    allowed = stored * exact_grad.abs() + (8 * eps * largest + of_truth) * grad_loss.abs()[:, None]
    assert ((grad.cpu().double() - exact_grad).abs() <= allowed + info.smallest_normal * info.eps).all()
    return launches


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(gpu, dtype):
    check(gpu, call_of(5, 37, dtype), 0.1)
    check(gpu, call_of(3, 64, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64_everywhere(gpu, dtype):
    for rows, classes, smoothing in [(1, 1, 0.0), (9, 1003, 0.3), (2, 9000, 1.0)]:
        check(gpu, call_of(rows, classes, dtype), smoothing, seed=rows)


def test_rows_longer_than_a_block(gpu, monkeypatch):
    monkeypatch.setattr(kernels, "LONGEST_BLOCK", 32)
    check(gpu, call_of(3, 75, torch.float32), 0.1, seed=2, warp_races=True)


def test_large_logits_and_strides(gpu):
    logits, *rest = call_of(5, 100, torch.float32, spread=10.0)
    check(gpu, (logits + 2e4, *rest), 0.1)
    check(gpu, (logits.T.contiguous().T, *rest), 0.1)


@pytest.mark.parametrize(
    "dtype, weighted, direct",
    [(torch.float32, True, False), (torch.float16, True, True), (torch.float32, False, True)],
    ids=str,
)
def test_weights_and_ignored_classes(gpu, dtype, weighted, direct):
    """Rows of which both terms count, one or none, and a class of weight 0."""
    call = call_of(9, 37, dtype)
    call[1][::3] = 255
    weight = None
    if weighted:
        weight = torch.rand(37, generator=torch.Generator().manual_seed(1))
        weight[18] = 0
    for smoothing in (0.0, 0.1):
        check(gpu, call, smoothing, weight, 255, direct)


def test_the_denominator_of_the_mean(gpu):
    logits, target, permutation, lam, _ = call_of(6, 9, torch.float32)
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
    logits, _, _, lam, upstream = call_of(6, 9, torch.float32)
    logits[0], logits[1, 7], logits[4:, 5] = torch.nan, torch.inf, -torch.inf
    weight = torch.ones(9)
    weight[5] = 0
    target = torch.tensor([-100, 9, -1, 2**40, 3, 5])
    partners = torch.tensor([-100, 9, -1, 2**40, -100, 4])
    permutation = torch.tensor([0, 6, -1, 2**40, 3, 4])
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
    logits, target, permutation, lam, grad_loss = call_of(8, 1024, torch.float32)
    logits = aligned(logits)
    with gpu.triton() as launches:
        run((logits, target, permutation, lam), grad_loss, 0.1)
    minimum = logits.nbytes // SECTOR
    few = 8 * 4 * 12  # what every warp reads of its row's numbers
    assert minimum <= counted(launches, "loss_kernel").global_load_sectors <= 1.02 * minimum + few
    backward = counted(launches, "grad_kernel")
    assert minimum <= backward.global_load_sectors <= 1.02 * minimum + few
    assert minimum <= backward.global_store_sectors <= 1.1 * minimum
