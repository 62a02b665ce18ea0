"""The Triton kernel of `batch_hard`, as compiled code, against the definition."""

import pytest
import torch

from ssl_kernels.reference.batch_hard import batch_hard as reference
from ssl_kernels.triton.batch_hard import batch_hard, unsupported

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def labels_of(n, classes, seed=0):
    return torch.randint(-3, classes - 3, (n,), generator=torch.Generator().manual_seed(seed)) * 2**33


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
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(-1, 2, (n, d), generator=generator).to(dtype)
    x[40:60] = x[30]
    labels = labels_of(n, 6)
    labels[5] = 12345  # no positive
    x, labels = x.to(gpu.device), labels.to(gpu.device)
    for nan in (False, True):
        if nan:
            x[[7, 50, 51]] = torch.nan
        with gpu.triton():
            got = batch_hard(x, labels, False, distance)
        expected = reference(x.cpu().double(), labels.cpu(), False, distance)
        for ours, right in zip(got, expected, strict=True):
            assert torch.equal(ours.cpu(), right)


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
def test_chosen_distances_are_the_best_up_to_rounding(gpu, dtype):
    x = torch.randn(70, 24, generator=torch.Generator().manual_seed(1)).to(dtype).to(gpu.device)
    labels = labels_of(70, 5).to(gpu.device)
    with gpu.triton():
        positive, negative = batch_hard(x, labels, True, "euclidean")
    unit = torch.nn.functional.normalize(x.double().cpu(), dim=1)
    distance = 1 - unit @ unit.T
    row = torch.arange(70)
    for index, right in zip((positive, negative), reference(x.cpu().double(), labels.cpu()), strict=True):
        assert ((distance[row, index.cpu()] - distance[row, right]).abs() < 1e-6).all()


def test_few_rows_split_the_walk(gpu):
    x = torch.randn(1100, 16, generator=torch.Generator().manual_seed(2)).bfloat16().to(gpu.device)
    labels = labels_of(1100, 9).to(gpu.device)
    with gpu.triton() as launches:
        got = batch_hard(x, labels, False, "cosine")
    if gpu.emulated:
        (launch,) = (launch for launch in launches if launch.kernel == "batch_hard_kernel")
        assert launch.grid[1] > 1
    keys = -(x.double() @ x.double().T).cpu()
    same = labels.cpu()[:, None] == labels.cpu()[None, :]
    best = keys.masked_fill(~same | torch.eye(1100, dtype=torch.bool), -torch.inf).amax(1)
    chosen = keys[torch.arange(1100), got[0].cpu()]
    assert ((chosen - best).abs() < 1e-4).all()


def test_unsupported_calls_say_why(gpu):
    with gpu.triton():
        assert unsupported(torch.ones(4, 8, device=gpu.device)) is None
        assert "torch.int64" in unsupported(torch.ones(4, 8, dtype=torch.int64, device=gpu.device))
