"""CUDA kernels of `batch_hard`, as nvcc compiled them, against float64 and by the definition."""

from math import ceil

import pytest
import torch

from tests.cuda.batch_hard_calls import batch_hard, check_choice, check_indices
from tests.cuda.test_contrastive import WIDTHS, flavours
from tests.helpers import random_rows
from tests.support.batch_hard import labels_of, small_integers

SOURCE = "batch_hard.cu"
DISTANCES = ("euclidean", "cosine")


@flavours
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("n, d, classes, splits", [(1, 1, 1, 0), (65, 17, 7, 2), (130, 72, 40, 3)])
def test_hardest_of_random_rows(library, gpu, n, d, classes, splits, distance, dtype, tf32):
    x, labels = random_rows(n, d, dtype).to(gpu.device), labels_of(n, classes).to(gpu.device)
    check_choice(library, x, labels, True, distance, tf32=tf32, splits=splits)
    check_choice(library, x, labels, False, distance, tf32=tf32, splits=splits)


@pytest.mark.slow
@flavours
@pytest.mark.parametrize("d", [*WIDTHS, 520])
def test_hardest_of_random_rows_everywhere(library, gpu, d, dtype, tf32):
    for i, n in enumerate((2, 3, 65, 130, 200)):
        x, labels = random_rows(n, d, dtype, seed=i).to(gpu.device), labels_of(n, 5, i).to(gpu.device)
        check_choice(library, x, labels, i % 2 > 0, DISTANCES[i % 2], tf32=tf32, splits=i % 4)


@flavours
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("splits", [1, 3])
def test_exact_keys_are_chosen_to_the_index(library, gpu, distance, splits, dtype, tf32):
    """Small integers: every key is exact, many are equal, and the lowest index wins, in any order of visits."""
    x = small_integers(210, 6, dtype)
    x[100:130] = x[70]
    labels = labels_of(210, 6)
    check_indices(library, x.to(gpu.device), labels.to(gpu.device), distance, splits=splits, tf32=tf32)


@pytest.mark.parametrize("labels", [torch.zeros(70), torch.arange(70)], ids=["one class", "no pairs"])
def test_rows_without_a_candidate(library, gpu, labels):
    x, labels = random_rows(70, 8, torch.float32).to(gpu.device), labels.long().to(gpu.device)
    (positive, negative), _ = batch_hard(library, x, labels, True, "euclidean")
    nothing, something = (negative, positive) if labels[1] == 0 else (positive, negative)
    assert (nothing == -1).all() and (something >= 0).all()


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_goes_before_every_key(library, gpu, distance, dtype):
    x = random_rows(140, 8, dtype)
    labels = torch.arange(140) % 2
    for i in (37, 45, 80, 81, 139):
        x[i, 3] = torch.nan
    got = check_indices(library, x.to(gpu.device), labels.to(gpu.device), distance, splits=2)
    assert got[0][0] == 80 and got[1][0] == 37


def test_infinite_keys_can_be_chosen(library, gpu):
    x = torch.tensor([[1.0], [-torch.inf], [torch.inf], [2.0]], device=gpu.device)
    labels = torch.tensor([0, 0, 1, 1], device=gpu.device)
    (positive, negative), _ = batch_hard(library, x, labels, False, "cosine")
    assert positive[:2].tolist() == [1, 0] and negative[0] == 2 and negative[3] == 0


def test_strides_and_wide_rows(library, gpu):
    x = random_rows(70, 520, torch.float16).to(gpu.device)
    labels = labels_of(70, 4).to(gpu.device)
    expected, _ = batch_hard(library, x, labels, True, "euclidean")
    got, _ = batch_hard(library, x.T.contiguous().T, labels, True, "euclidean")
    for ours, right in zip(got, expected, strict=True):
        assert torch.equal(ours, right)
    check_choice(library, x, labels, True, "euclidean")


def test_every_schedule_gives_the_same_indices(library, gpu):
    x, labels = random_rows(140, 40, torch.bfloat16).to(gpu.device), labels_of(140, 5).to(gpu.device)
    first, _ = batch_hard(library, x, labels, True, "euclidean", splits=2)
    for seed in (1, 2):
        again, _ = batch_hard(library, x, labels, True, "euclidean", splits=2, seed=seed, warp_races=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_calls_can_be_captured(library, gpu):
    if not gpu.emulated:
        pytest.skip("tests/ops captures the operator on a card")
    x, labels = random_rows(20, 17, torch.float16), labels_of(20, 3)
    _, launches = batch_hard(library, x, labels, True, "euclidean", capturing=True, stream=7)
    assert {launch.stream for launch in launches} == {7}


@pytest.mark.parametrize(
    "n, d, dtype",
    [
        (256, 128, torch.bfloat16),
        (128, 256, torch.float16),
        (256, 320, torch.float16),
        (128, 64, torch.float32),
    ],
)
def test_kernel_does_what_its_header_says(library, gpu, n, d, dtype):
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    _, launches = batch_hard(library, random_rows(n, d, dtype), labels_of(n, 9), True, "euclidean", splits=1)
    (launch,) = [launch for launch in launches if "batch_hard_kernel" in launch.kernel]
    counters, steps = launch.counters, ceil(d * dtype.itemsize / 128)
    blocks, tiles = ceil(n / 128), ceil(n / 64)
    assert counters.mma == (256 * blocks * tiles * steps if dtype.itemsize == 2 else 0)
    held = 1 if dtype.itemsize == 2 else 0
    slots = max(min(steps, 3), steps - held)
    stays = slots <= {80: 3, 90: 5}[library.arch]
    assert launch.shared == (slots if stays else 3) * 128 * 128 + 3 * 64 * (136 + 8)
    own = 4 * n * (steps + (0 if stays else (steps - held) * (tiles - 1)))
    paper = own + 4 * blocks * n * steps + blocks * tiles * (64 // 4 + 64 // 4) + 48 * blocks
    assert counters.global_load_sectors == pytest.approx(paper, rel=0.02)
    assert counters.global_store_sectors == n * 16 // 32
    assert counters.shared_wavefronts == counters.shared_wavefronts_ideal
    assert counters.divergent_instructions < counters.instructions / 100
