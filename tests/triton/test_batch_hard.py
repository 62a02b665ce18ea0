"""The Triton kernel of `batch_hard`, as compiled code, against the definition."""

import itertools

import pytest
import torch

from ssl_kernels.triton.batch_hard import batch_hard, unsupported
from tests.helpers import random_rows
from tests.support.batch_hard import check_choice, check_indices, labels_of, small_integers


@pytest.mark.parametrize(
    "n, d, dtype, distance",
    [
        (130, 17, torch.bfloat16, "euclidean"),
        pytest.param(65, 300, torch.float16, "cosine", marks=pytest.mark.slow),
        pytest.param(65, 17, torch.float32, "cosine", marks=pytest.mark.slow),
        pytest.param(65, 17, torch.float64, "euclidean", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_exact_keys_are_chosen_to_the_index(gpu, n, d, dtype, distance):
    """Small integers: every key is exact, many are equal, the lowest index wins; NaN goes before all."""
    x = small_integers(n, d, dtype)
    x[40:60] = x[30]
    labels = labels_of(n, 6)
    labels[5] = 12345  # no positive
    x, labels = x.to(gpu.device), labels.to(gpu.device)
    for nan in (False, True):
        if nan:
            x[[7, 50, 51]] = torch.nan
        with gpu.triton():
            found = batch_hard(x, labels, False, distance)
        check_indices(found, x, labels, distance)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
def test_chosen_distances_are_the_best_up_to_rounding(gpu, dtype):
    x, labels = random_rows(70, 24, dtype).to(gpu.device), labels_of(70, 5).to(gpu.device)
    for normalize, distance in itertools.product((True, False), ("euclidean", "cosine")):
        with gpu.triton():
            found = batch_hard(x, labels, normalize, distance)
        check_choice(found, x, labels, normalize, distance)


def test_few_rows_split_the_walk(gpu):
    x, labels = random_rows(1100, 16, torch.bfloat16).to(gpu.device), labels_of(1100, 9).to(gpu.device)
    with gpu.triton() as launches:
        found = batch_hard(x, labels, False, "cosine")
    if gpu.emulated:
        (launch,) = (launch for launch in launches if launch.kernel == "batch_hard_kernel")
        assert launch.grid[1] > 1
    check_choice(found, x, labels, False, "cosine")


def test_unsupported_calls_say_why(gpu):
    with gpu.triton():
        assert unsupported(torch.ones(4, 8, device=gpu.device)) is None
        assert "torch.int64" in unsupported(torch.ones(4, 8, dtype=torch.int64, device=gpu.device))
