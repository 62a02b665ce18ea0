"""CUDA kernels of `mixup`, as nvcc compiled them, against float64."""

import numpy as np
import pytest
import torch

from tests.cuda.mixing_calls import aligned, counted, library_of, mixup, mixup_bwd
from tests.support.mixing import PERMUTATIONS, check_mixup, check_mixup_gradients, permutation_of, shares_of

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SECTOR = 32


@pytest.fixture
def library(gpu, nvcc):
    return library_of(gpu, "mixup")


def batch_of(count, features, dtype, device, *, seed=0, pad=0, offset=0):
    """(count, features) random numbers; NaN lies before, and `pad` elements of it between the samples."""
    generator = torch.Generator().manual_seed(seed)
    memory = torch.full((count * (features + pad) + offset,), torch.nan, dtype=dtype, device=device)
    batch = memory.as_strided((count, features), (features + pad, 1), offset)
    batch.copy_(torch.randn(count, features, generator=generator, dtype=torch.float64).to(dtype))
    return batch


def check(library, x, lam, permutation, **options):
    """In place, out of place and backward of one batch against float64."""
    out, launches = mixup(library, x, lam, permutation, torch.full_like(x, torch.nan), **options)
    check_mixup(out, x, lam, permutation)
    inplace = x.clone(memory_format=torch.preserve_format) if x.is_contiguous() else x
    mixup(library, inplace, lam, permutation, inplace, **options)
    assert torch.equal(inplace, out)
    return out, launches


def check_bwd(library, grad, x, lam, permutation, **options):
    grad_x, grad_lam, _ = mixup_bwd(library, grad, x, lam, permutation, **options)
    check_mixup_gradients(grad_x, grad_lam, grad, x, lam, permutation)
    without_lam, nothing, _ = mixup_bwd(library, grad, None, lam, permutation, **options)
    assert nothing is None and torch.equal(without_lam, grad_x)
    nothing, only_lam, _ = mixup_bwd(library, grad, x, lam, permutation, x_needs_grad=False, **options)
    assert nothing is None and torch.equal(only_lam, grad_lam)


@pytest.mark.parametrize("kind", PERMUTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(library, gpu, dtype, kind):
    """Odd batches; a width of whole vectors and one with features left over."""
    for count, features, pad in [(9, 96, 0), (7, 37, 11 if dtype.itemsize == 4 else 3)]:
        x = batch_of(count, features, dtype, gpu.device, pad=pad)
        permutation = permutation_of(kind, count).to(gpu.device)
        lam = shares_of(count, dtype).to(gpu.device)
        grad = batch_of(count, features, dtype, gpu.device, seed=5)
        check_bwd(library, grad, x, lam, permutation)
        check(library, x, lam, permutation)


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("kind", ["random", "one cycle", "fixed points"])
def test_cuts_between_parts(library, gpu, kind, parts):
    x = batch_of(23, 40, torch.float32, gpu.device)
    permutation = permutation_of(kind, 23, seed=parts).to(gpu.device)
    lam = shares_of(23, torch.float32, seed=parts).to(gpu.device)
    check_bwd(library, batch_of(23, 40, torch.float32, gpu.device, seed=5), x, lam, permutation, parts=parts)
    check(library, x, lam, permutation, parts=parts, seed=parts)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_smallest_batches(library, gpu, count):
    for kind in ("identity", "roll"):
        x = batch_of(count, 5, torch.float32, gpu.device)
        permutation, lam = permutation_of(kind, count), torch.full((count,), 0.25)
        check(library, x, lam.to(gpu.device), permutation.to(gpu.device))


def test_more_samples_than_threads_that_order_them(library, gpu):
    count = 1500
    x = batch_of(count, 4, torch.float32, gpu.device)
    permutation, lam = permutation_of("random", count), shares_of(count, torch.float32)
    check(library, x, lam.to(gpu.device), permutation.to(gpu.device), seed=1)


def test_strided_arguments(library, gpu):
    """One share for all by a stride of 0, a permutation out of a wider tensor, samples off 16 bytes."""
    x = batch_of(6, 33, torch.float16, gpu.device, offset=3)
    permutation = torch.stack([permutation_of("random", 6), torch.full((6,), -1)], 1).to(gpu.device)[:, 0]
    lam = torch.tensor([0.3], device=gpu.device).expand(6)
    check(library, x, lam, permutation)


def test_a_weight_of_zero_leaves_out_what_is_not_finite(library, gpu):
    x = torch.tensor([[1.0, torch.inf], [torch.nan, 2.0], [3.0, 4.0]], device=gpu.device)
    lam = torch.tensor([0.0, 1.0, 0.5], device=gpu.device)
    out, _ = mixup(library, x, lam, torch.tensor([2, 0, 1], device=gpu.device))
    assert out[0].tolist() == [3.0, 4.0] and out[1, 1] == 2 and out[1, 0].isnan()
    assert out[2, 0].isnan() and out[2, 1] == 3
    grad = torch.tensor([[torch.inf], [2.0]], device=gpu.device)
    lam, permutation = torch.tensor([0.0, 0.5], device=gpu.device), torch.tensor([1, 0], device=gpu.device)
    grad_x, _, _ = mixup_bwd(library, grad, None, lam, permutation)
    assert grad_x[0] == 1


def test_offsets_over_32_bits(library, gpu):
    stride = 2**31 + 64
    if gpu.emulated:  # numpy leaves the pages untouched, so they take no memory
        memory = torch.from_numpy(np.empty(stride + 64, np.int16)).view(torch.bfloat16)
    else:
        memory = torch.zeros(stride + 64, dtype=torch.bfloat16, device=gpu.device)
    x = memory.as_strided((2, 64), (stride, 1)).copy_(batch_of(2, 64, torch.bfloat16, gpu.device))
    lam, permutation = torch.tensor([0.3, 0.6], device=gpu.device), torch.tensor([1, 0], device=gpu.device)
    expected, _ = mixup(library, x.clone(), lam, permutation, torch.zeros_like(x.clone()))
    mixup(library, x, lam, permutation, x, races=False, grid_races=False)  # which remember every byte
    assert torch.equal(x, expected)


@pytest.mark.parametrize("parts", [1, 3])
def test_every_schedule_gives_the_same_bits(library, gpu, parts):
    x = batch_of(70, 72, torch.bfloat16, gpu.device)
    permutation = permutation_of("random", 70).to(gpu.device)
    lam = shares_of(70, torch.bfloat16).to(gpu.device)
    results = []
    for options in ({}, {"seed": 1}, {"seed": 2, "warp_races": True}):
        inplace = x.clone()
        mixup(library, inplace, lam, permutation, inplace, parts=parts, **options)
        grads = mixup_bwd(library, x, inplace, lam, permutation, parts=parts, **options)[:2]
        results.append((inplace, *grads))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "bad", [[0, 0, 0, 0, 0], [1, 1, 2, 4, 3], [9, -1, 3, 2, 4], [1, 2, 3, 3, 0], [2**40, 0, 1, 2, 3]], ids=str
)
def test_what_is_no_permutation_leaves_the_batch_as_it_is(library, gpu, bad):
    x = batch_of(5, 37, torch.float32, gpu.device)
    before, lam = x.clone(), torch.rand(5, device=gpu.device)
    mixup(library, x, lam, torch.tensor(bad, device=gpu.device), x)
    assert torch.equal(x, before)
    grad_x, grad_lam, _ = mixup_bwd(library, before, x, lam, torch.tensor(bad, device=gpu.device))
    assert torch.equal(grad_x, before) and (grad_lam == 0).all()
    x, none = batch_of(70, 3, torch.float32, gpu.device), torch.arange(70, device=gpu.device).roll(1)
    none[69] = bad[0] + 70  # which only the last of three warps sees
    before = x.clone()
    mixup(library, x, torch.rand(70, device=gpu.device), none, x)
    assert torch.equal(x, before)


def test_shares_that_are_none_end_inside_the_tensors(library, gpu):
    x = batch_of(5, 37, torch.float32, gpu.device)
    lam = torch.tensor([-1.0, 7.0, torch.inf, torch.nan, 1.0], device=gpu.device)
    mixup(library, x, lam, permutation_of("one cycle", 5).to(gpu.device), x)
    assert x[3].isnan().all()


def test_calls_can_be_captured(library, gpu):
    if not gpu.emulated:
        pytest.skip("tests/ops captures the operator on a card")
    x, permutation = batch_of(70, 40, torch.float16, gpu.device), permutation_of("random", 70)
    lam = shares_of(70, torch.float16)
    options = {"capturing": True, "stream": 7, "parts": 2}
    _, launches = mixup(library, x, lam, permutation, x, **options)
    *_, more = mixup_bwd(library, x, x.clone(), lam, permutation, **options)
    assert {launch.stream for launch in [*launches, *more]} == {7}


@pytest.mark.parametrize("in_place", [True, False], ids=["in place", "out of place"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_element_is_read_once_and_written_once(library, gpu, dtype, in_place):
    """Sectors within 10 % of the minimum, in the number of parts that the launcher picks for few features.

    The steps count: a sector of each for a warp, two in float64, though they come from the first-level cache.
    """
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    count, features = 128, 1024
    x = aligned(batch_of(count, features, dtype, "cpu"))
    out = x if in_place else aligned(torch.zeros_like(x))
    lam = torch.full((count,), 0.3, dtype=shares_of(1, dtype).dtype)
    _, launches = mixup(library, x, lam, permutation_of("one cycle", count), out)
    mixing = counted(launches, "walk_kernel") + counted(launches, "edges_kernel")
    assert next(launch for launch in launches if "walk_kernel" in launch.kernel).grid[1] > 1
    minimum = count * features * dtype.itemsize // SECTOR
    allowed = 1.17 if dtype == torch.float64 else 1.1
    assert minimum <= mixing.global_load_sectors <= allowed * minimum
    assert minimum <= mixing.global_store_sectors <= 1.1 * minimum
    assert mixing.global_store_requests <= 1.1 * minimum / 16


def test_what_stays_as_it_is_costs_nothing(library, gpu):
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    x = aligned(torch.zeros(64, 256))
    lam = torch.full((64,), 0.3)
    _, launches = mixup(library, x, lam, torch.arange(64), x, parts=1)
    idle = counted(launches, "walk_kernel")
    assert idle.global_store_sectors == 0 and idle.global_load_sectors <= 2 * 64
    _, launches = mixup(library, x, torch.ones(64), permutation_of("one cycle", 64), x, parts=1)
    idle = counted(launches, "walk_kernel")
    assert idle.global_store_sectors == 0 and idle.global_load_sectors <= 2 * 64


def test_backward_reads_both_once(library, gpu):
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    count, features = 128, 1024
    grad, x = (aligned(torch.zeros(count, features)) for _ in range(2))
    lam, permutation = torch.full((count,), 0.3), permutation_of("one cycle", count)
    *_, launches = mixup_bwd(library, grad, x, lam, permutation)
    both = counted(launches, "mixup_grad_kernel")
    minimum = count * features * 4 // SECTOR
    assert 2 * minimum <= both.global_load_sectors <= 2.2 * minimum
    assert minimum <= both.global_store_sectors <= 1.1 * minimum
