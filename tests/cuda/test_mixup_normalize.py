"""CUDA kernel of `mixup_normalize`, as nvcc compiled it, against float64."""

import pytest
import torch

from tests.cuda.mixing_calls import aligned, counted, library_of, mixup_normalize
from tests.support.mixing import PERMUTATIONS, check_mixup_normalize, permutation_of, shares_of, statistics

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SECTOR = 32
LAYOUTS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}


@pytest.fixture
def library(gpu, nvcc):
    return library_of(gpu, "mixup_normalize")


def images(shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def check(library, gpu, x, permutation, dtype, **options):
    lam = shares_of(len(x), dtype)
    mean, std = statistics(x.shape[1])
    on_device = [tensor.to(gpu.device) for tensor in (x, lam, permutation, mean, std)]
    out, launches = mixup_normalize(library, *on_device, dtype, **options)
    check_mixup_normalize(out, x, lam, permutation, mean, std, dtype)
    assert out.stride() == x.stride()
    return out, launches


@pytest.mark.parametrize("kind", PERMUTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(library, gpu, dtype, kind):
    for shape in [(7, 3, 4, 8), (5, 2, 3, 7)]:
        check(library, gpu, images(shape), permutation_of(kind, shape[0]), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(library, gpu, dtype, layout):
    for shape in [(6, 3, 8, 8), (6, 3, 5, 5), (1, 1, 2, 9)]:
        x = images(shape).to(memory_format=LAYOUTS[layout])
        check(library, gpu, x, permutation_of("one cycle", len(x)), dtype)


@pytest.mark.parametrize("parts", [2, 5])
def test_cuts_and_schedules(library, gpu, parts):
    x = images((23, 3, 4, 8))
    permutation = permutation_of("random", 23)
    first, _ = check(library, gpu, x, permutation, torch.bfloat16, parts=parts)
    again, _ = check(library, gpu, x, permutation, torch.bfloat16, parts=parts, seed=2, warp_races=True)
    assert torch.equal(first, again)


def test_what_is_no_permutation_normalizes_the_batch_as_it_is(library, gpu):
    x, (mean, std) = images((3, 2, 4, 4)), statistics(2)
    on_device = [tensor.to(gpu.device) for tensor in (x, torch.rand(3), torch.arange(3), mean, std)]
    expected, _ = mixup_normalize(library, *on_device, torch.float32)
    on_device[2] = torch.tensor([2**40, 0, 0], device=gpu.device)
    out, _ = mixup_normalize(library, *on_device, torch.float32)
    assert torch.equal(out, expected)


def test_calls_can_be_captured(library, gpu):
    if not gpu.emulated:
        pytest.skip("tests/ops captures the operator on a card")
    _, launches = check(
        library, gpu, images((5, 3, 4, 4)), permutation_of("roll", 5), torch.float32, capturing=True, stream=7
    )
    assert {launch.stream for launch in launches} == {7}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_byte_is_read_once_and_each_element_written_once(library, gpu, dtype):
    """Sectors within 10 % of the minimum."""
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    x, (mean, std) = aligned(images((64, 4, 16, 32))), statistics(4)
    out = aligned(torch.zeros(x.shape, dtype=dtype))
    lam, permutation = torch.full((64,), 0.3), permutation_of("one cycle", 64)
    _, launches = mixup_normalize(library, x, lam, permutation, mean, std, dtype, out=out)
    counters = counted(launches, "mixup_normalize_kernel")
    writes, reads = out.nbytes // SECTOR, x.nbytes // SECTOR
    assert writes == counters.global_store_sectors
    assert (
        reads + writes
        <= counters.global_load_sectors + counters.global_store_sectors
        <= 1.1 * (reads + writes)
    )
    assert counters.global_store_requests == writes // 16
