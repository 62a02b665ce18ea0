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


def check(gpu, call, smoothing=0.0, **options):
    logits, target, permutation, lam, grad_loss = call
    leaf = logits.double().requires_grad_()
    exact = reference.mixup_cross_entropy(leaf, target, permutation, lam.double(), smoothing)
    (exact_grad,) = torch.autograd.grad(exact, leaf, grad_loss)
    *operands, upstream = (tensor.to(gpu.device) for tensor in call)
    with gpu.triton(**options) as launches:
        loss, lse = kernels.mixup_cross_entropy_fwd(*operands, smoothing)
        grad = kernels.mixup_cross_entropy_bwd(upstream, *operands, lse, smoothing)
    # Differences of logits enter, so that their size does not count, but in the mean that smoothing takes.
    size = 2 + smoothing * leaf.detach().abs().amax(1)
    eps = torch.finfo(lam.dtype).eps
    assert ((loss.cpu() - exact.detach()).abs() <= 4 * eps * size).all()
    info = torch.finfo(grad.dtype)
    stored = 0 if grad.dtype == lam.dtype else info.eps / 2
    of_truth = torch.finfo(torch.float64).eps * logits.shape[1] ** 0.5  # it sums over the classes
    allowed = stored * exact_grad.abs() + (8 * eps + of_truth) * grad_loss.abs()[:, None]
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


def test_bad_targets_have_no_weight_and_minus_infinity_leaves_a_class_out(gpu):
    logits, _, _, lam, _ = (tensor.to(gpu.device) for tensor in call_of(4, 9, torch.float32))
    logits[:, 5] = -torch.inf
    target = torch.tensor([9, -1, 2**40, 3], device=gpu.device)
    permutation = torch.tensor([4, -1, 2**40, 3], device=gpu.device)
    with gpu.triton():
        loss, lse = kernels.mixup_cross_entropy_fwd(logits, target, permutation, lam, 0.0)
    assert torch.equal(loss[:3], lse[:3]) and loss.isfinite().all()


def test_logits_are_read_once_in_each_pass(gpu):
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    logits, target, permutation, lam, grad_loss = call_of(8, 1024, torch.float32)
    logits = aligned(logits)
    with gpu.triton() as launches:
        _, lse = kernels.mixup_cross_entropy_fwd(logits, target, permutation, lam, 0.1)
        kernels.mixup_cross_entropy_bwd(grad_loss, logits, target, permutation, lam, lse, 0.1)
    minimum = logits.nbytes // SECTOR
    few = 8 * 4 * 12  # what every warp reads of its row's numbers
    assert minimum <= counted(launches, "loss_kernel").global_load_sectors <= 1.02 * minimum + few
    backward = counted(launches, "grad_kernel")
    assert minimum <= backward.global_load_sectors <= 1.02 * minimum + few
    assert minimum <= backward.global_store_sectors <= 1.1 * minimum
