import pytest
import torch

from ssl_kernels.recipes.collapse import (
    BY_CLASS,
    EMBEDDINGS,
    covariance_spectrum,
    effective_rank,
    for_so_many,
    measure_health,
)


def test_spread_is_one_less_the_mean_cosine():
    rows = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert measure_health(rows).spread == pytest.approx(1 - (unit @ unit.T).mean().item(), abs=1e-6)


def test_rank_counts_directions():
    assert effective_rank(torch.tensor([1.0, 1, 1, 0])) == pytest.approx(3)
    assert effective_rank(torch.tensor([1.0, 0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0
    assert effective_rank(torch.tensor([4.0, 2, 2])) == pytest.approx(2**1.5)


def test_eight_rows_are_judged_by_their_rank():
    assert for_so_many(EMBEDDINGS, 8) == EMBEDDINGS
    assert for_so_many(EMBEDDINGS, 7).rank == 0 and for_so_many(EMBEDDINGS, 7).spread == EMBEDDINGS.spread


def test_spectrum_is_that_of_the_covariance():
    rows = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.linalg.eigvalsh(torch.cov(rows.T)).flip(0)
    torch.testing.assert_close(covariance_spectrum(rows), expected)


@pytest.mark.parametrize(
    "rows, words",
    [
        (torch.ones(8, 4), "all embeddings point the same way: their mean cosine is 1.0000"),
        (torch.zeros(8, 4), "all embeddings point the same way"),
        (torch.ones(8, 4) + 1e-3 * torch.eye(8, 4), "all embeddings point the same way"),
        (torch.tensor([1.0, -1])[:, None].repeat(4, 3), "their effective rank is 1.00"),
    ],
    ids=["equal", "zero", "nearly equal", "one direction"],
)
def test_collapse_is_described(rows, words):
    assert words in measure_health(rows).complaint(EMBEDDINGS)


def test_spread_rows_are_healthy():
    assert measure_health(torch.eye(8)).complaint(EMBEDDINGS) == ""


@pytest.mark.parametrize("count", [1, 2, 3])
def test_few_rows_have_few_directions(count):
    """Two images vary in one direction, however well they are told apart."""
    rows = torch.eye(count, 6).repeat(2, 1)
    complaint = measure_health(rows).complaint(for_so_many(EMBEDDINGS, len(rows)))
    assert complaint.startswith("all embeddings point the same way" if count == 1 else "")
    assert bool(complaint) == (count == 1)


def test_one_direction_is_enough_for_two_classes():
    rows = torch.tensor([1.0, -1])[:, None].repeat(4, 3)
    assert measure_health(rows).complaint(BY_CLASS) == ""
