"""The Triton kernel of `mixup_normalize`, as compiled code, against float64."""

import pytest
import torch

from ssl_kernels.triton import mixup_normalize as kernels
from tests.cuda.mixing_calls import aligned, counted
from tests.support.mixing import check_mixup_normalize, permutation_of, shares_of, statistics

SECTOR = 32


def images(shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def check(gpu, x, permutation, dtype, **options):
    lam = shares_of(len(x), dtype)
    mean, std = statistics(x.shape[1])
    on_device = [tensor.to(gpu.device) for tensor in (lam, permutation, mean, std)]
    images_on_device = torch.empty_like(x, device=gpu.device).copy_(x)
    with gpu.triton(**options) as launches:
        out = kernels.mixup_normalize(images_on_device, *on_device, dtype)
    check_mixup_normalize(out, x, lam, permutation, mean, std, dtype)
    assert out.stride() == torch.empty_like(x).stride()
    return launches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_float64(gpu, dtype):
    check(gpu, images((7, 3, 4, 8)), permutation_of("random", 7), dtype)
    check(gpu, images((5, 2, 3, 7)), permutation_of("fixed points", 5), dtype, seed=2, warp_races=True)


def test_layouts(gpu):
    x, permutation = images((6, 3, 5, 5)), permutation_of("one cycle", 6)
    check(gpu, x.to(memory_format=torch.channels_last), permutation, torch.float32)
    check(gpu, x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2), permutation, torch.float32)
    check(gpu, images((6, 4, 5, 5))[:, 1:], permutation, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_byte_is_read_once_and_each_element_written_once(gpu, dtype):
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    x = aligned(images((64, 4, 32, 32)))
    arguments = torch.full((64,), 0.3), permutation_of("one cycle", 64), torch.rand(4), torch.ones(4)
    with gpu.triton() as launches:
        kernels.mixup_normalize(x, *arguments, dtype)
    counters = counted(launches, "mixup_normalize_kernel")
    reads = x.nbytes // SECTOR
    writes = reads * dtype.itemsize
    warps = x[0].numel() // 512
    steps = (
        3 * (64 + 3) * warps + 2 * 16 * warps
    )  # words and weights, a sector each; the means and deviations
    assert reads <= counters.global_load_sectors <= reads + steps
    assert counters.global_store_sectors == writes
    assert counters.global_load_sectors + writes <= 1.1 * (reads + writes)
    # 16 bytes per thread, both ways.
    assert counters.global_load_requests <= reads // 16 + steps
    assert counters.global_store_requests == writes // 16
