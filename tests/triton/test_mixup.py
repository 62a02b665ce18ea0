"""The Triton kernels of `mixup`, as compiled code, against float64."""

import pytest
import torch

from ssl_kernels.triton import mixup as kernels
from ssl_kernels.triton import permutation_walk
from tests.cuda.mixing_calls import aligned, counted
from tests.helpers import DTYPES
from tests.support.mixing import PERMUTATIONS, check_mixup, check_mixup_gradients, permutation_of, shares_of

SECTOR = 32
SAMPLE = [("random", torch.bfloat16), ("one cycle", torch.float32), ("fixed points", torch.float16)]
EVERYTHING = [(kind, dtype) for kind in PERMUTATIONS for dtype in DTYPES]


def randn(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check(gpu, x, lam, permutation, **options):
    on_device = [tensor.to(gpu.device) for tensor in (lam, permutation)]
    with gpu.triton(**options) as launches:
        out = kernels.mixup_fwd(x.to(gpu.device), *on_device)
        in_place = torch.empty_like(x, device=gpu.device).copy_(x)
        kernels.mixup_(in_place, *on_device)
    check_mixup(out, x, lam, permutation)
    assert torch.equal(in_place, out)
    return launches


def check_bwd(gpu, grad, x, lam, permutation, **options):
    on_device = [tensor.to(gpu.device) for tensor in (grad, x, lam, permutation)]
    with gpu.triton(**options):
        grad_x, grad_lam = kernels.mixup_bwd(*on_device, True)
        without_lam, nothing = kernels.mixup_bwd(on_device[0], None, *on_device[2:], True)
        no_grad_x, only_lam = kernels.mixup_bwd(*on_device, False)
    check_mixup_gradients(grad_x, grad_lam, grad, x, lam, permutation)
    assert torch.equal(without_lam, grad_x) and torch.equal(only_lam, grad_lam)
    assert nothing.shape == no_grad_x.shape == (0,)


def check_case(gpu, kind, dtype):
    for count, features in [(9, 96), (7, 37)]:
        permutation, lam = permutation_of(kind, count), shares_of(count, dtype)
        x, grad = randn(count, features, dtype=dtype), randn(count, features, dtype=dtype, seed=5)
        check(gpu, x, lam, permutation)
        check_bwd(gpu, grad, x, lam, permutation)


@pytest.mark.parametrize("kind, dtype", SAMPLE, ids=str)
def test_matches_float64(gpu, kind, dtype):
    check_case(gpu, kind, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("kind, dtype", EVERYTHING, ids=str)
def test_matches_float64_everywhere(gpu, kind, dtype):
    check_case(gpu, kind, dtype)


def test_layouts(gpu):
    """Channels last, batch innermost, samples apart, one share for all."""
    lam, permutation = torch.tensor([0.3]).expand(5), permutation_of("one cycle", 5)
    x = randn(5, 3, 4, 2, dtype=torch.float32)
    batch_innermost = x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    for batch in (x.to(memory_format=torch.channels_last), batch_innermost):
        check(gpu, batch, lam, permutation)
        check_bwd(gpu, randn(5, 3, 4, 2, dtype=torch.float32, seed=2), batch, lam, permutation)
    memory = randn(5, 2, 12, dtype=torch.float32).to(gpu.device)
    exact = memory.clone()
    with gpu.triton():
        exact[:, 1] = kernels.mixup_fwd(memory[:, 1], lam.to(gpu.device), permutation.to(gpu.device))
        kernels.mixup_(memory[:, 1], lam.to(gpu.device), permutation.to(gpu.device))
    assert torch.equal(memory, exact)


@pytest.mark.parametrize("blocks", ["one block", "several blocks"])
def test_every_schedule_gives_the_same_bits(gpu, blocks, monkeypatch):
    """Whatever orders the samples; races within a warp are looked for as well."""
    if blocks == "several blocks":
        monkeypatch.setattr(permutation_walk, "BLOCK", 64)
        monkeypatch.setattr(permutation_walk, "MOST_IN_A_BLOCK", 64)
    x, lam, permutation = (
        randn(150, 5, dtype=torch.float32),
        shares_of(150, torch.float32),
        permutation_of("random", 150),
    )
    check(gpu, x, lam, permutation)
    check(gpu, x, lam, permutation, seed=2, warp_races=True)
    check_bwd(gpu, x, x.flip(0), lam, permutation, seed=2, warp_races=True)


@pytest.mark.parametrize(
    "bad", [[0, 0, 0, 0, 0], [9, -1, 3, 2, 4], [1, 2, 3, 3, 0], [2**32 + 1, 0, 3, 4, 2]], ids=str
)
def test_what_is_no_permutation_leaves_the_batch_as_it_is(gpu, bad):
    x, lam = randn(5, 37, dtype=torch.float32).to(gpu.device), torch.rand(5, device=gpu.device)
    before = x.clone()
    with gpu.triton():
        kernels.mixup_(x, lam, torch.tensor(bad, device=gpu.device))
    assert torch.equal(x, before)


def test_a_weight_of_zero_leaves_out_what_is_not_finite(gpu):
    x = torch.tensor([[1.0, torch.inf], [torch.nan, -0.0], [3.0, 4.0]], device=gpu.device)
    lam = torch.tensor([0.0, 1.0, 0.5], device=gpu.device)
    with gpu.triton():
        out = kernels.mixup_fwd(x, lam, torch.tensor([2, 0, 1], device=gpu.device))
    assert out[0].tolist() == [3.0, 4.0] and out[1, 0].isnan() and out[2, 0].isnan() and out[2, 1] == 2
    assert torch.signbit(out[1, 1]) and out[1, 1] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_element_is_read_once_and_written_once(gpu, dtype):
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    x = aligned(randn(64, 4096, dtype=dtype))
    lam, permutation = torch.full((64,), 0.3), permutation_of("one cycle", 64)
    with gpu.triton() as launches:
        kernels.mixup_(x, lam, permutation)
    counters = counted(launches, "mixup_walk_kernel")
    minimum = x.nbytes // SECTOR
    assert counters.global_store_sectors == minimum and counters.global_store_requests == minimum // 16
    assert minimum <= counters.global_load_sectors <= 1.2 * minimum
    assert counters.global_load_sectors + counters.global_store_sectors <= 2.2 * minimum
