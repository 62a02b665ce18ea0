"""The functions that stand for pytorch-metric-learning's pair losses, and what its classes do beside their value."""

import sys
import warnings

import pytest
import torch
from hypothesis import given, settings

from ssl_kernels.adapters import pytorch_metric_learning as ours
from ssl_kernels.adapters._classes import as_classes
from tests.adapters.formulas import pytorch_metric_learning as formulas
from tests.adapters.uses import TOLERANCES, Use, cases, largest_error, results


@pytest.mark.parametrize("run", formulas.FUNCTIONS)
@settings(max_examples=8)
@given(case=cases())
def test_the_functions_are_the_formulas(run, case):
    use = Use("pytorch_metric_learning", "", run)
    found, expected = (
        results(use, space, case) for space in (formulas.Functions, sys.modules[formulas.__name__])
    )
    assert largest_error(found, expected) <= TOLERANCES[case.dtype]


def test_labels_may_be_floating():
    first, second = as_classes(torch.tensor([0.5, 2.0]), torch.tensor([2.0, 0.5, -1.0]))
    assert ((first[:, None] == second) == torch.tensor([[False, True, False], [True, False, False]])).all()


def test_a_pair_far_apart_has_its_loss():
    """The library's is 87.34 with gradient 0 from there on."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1e-3]], requires_grad=True)
    losses, anchors, positives = ours.nt_xent_of_pairs(x, torch.tensor([0, 0, 1]), None, None, 0.01)
    assert list(zip(anchors.tolist(), positives.tolist(), strict=True)) == [(0, 1), (1, 0)]
    assert losses[0].item() == pytest.approx(200, abs=0.01)
    assert torch.autograd.grad(losses[0], x)[0].abs().max() > 0.05


def test_rows_without_a_negative_have_loss_zero():
    x = torch.randn(3, 4, requires_grad=True)
    losses, *_ = ours.nt_xent_of_pairs(x, torch.zeros(3, dtype=torch.long), None, None, 0.1)
    assert len(losses) == 6 and not losses.any()
    assert not torch.autograd.grad(losses.sum(), x)[0].any()


def rows_of_pairs():
    """Of two classes of two rows, whose losses underflow in float32, and a row of its own; their labels."""
    near = torch.tensor([[1.0, 0.0], [1.0, 1e-3], [-1.0, 0.0], [-1.0, 1e-3], [0.0, 1.0]])
    return near, torch.tensor([0, 0, 1, 1, 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_columns", [False, True])
def test_a_row_with_a_positive_has_a_loss_above_zero(with_columns, dtype):
    """However small: the library's reducer takes the mean of the losses above 0."""
    x, labels = rows_of_pairs()
    x = x.to(dtype).requires_grad_()
    columns = (x.detach().clone(), labels, 0.01, torch.arange(5)) if with_columns else (None, None, 0.01)
    losses = ours.sup_con_of_rows(x, labels, *columns)
    assert (losses[:4] > 0).all() and losses.max() < 1e-6 and losses[4] == 0
    assert torch.autograd.grad(losses.sum(), x)[0].isfinite().all()


@pytest.mark.parametrize("with_columns", [False, True])
def test_a_row_against_its_positive_alone_has_loss_zero(with_columns):
    x, labels = rows_of_pairs()[0][:2], torch.zeros(2, dtype=torch.long)
    columns = (x, labels, 0.01, torch.arange(2)) if with_columns else (None, None, 0.01)
    assert not ours.sup_con_of_rows(x, labels, *columns).any()
    assert not ours.sup_con_of_rows(x, labels, x[:1], labels[:1], 0.01).any()


@pytest.fixture
def library():
    return pytest.importorskip(
        "pytorch_metric_learning.losses", reason="pytorch-metric-learning is not installed"
    )


def rows(n=12, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_strict_is_the_library(library):
    x, labels = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 1e-3]]), torch.tensor([0, 0, 1])
    strict = ours.NTXentLoss(0.01, strict=True)(x, labels)  # of the pairs (0, 1), 200, and (1, 0), log 2
    assert torch.equal(strict, library.NTXentLoss(0.01)(x, labels))
    assert strict.item() == pytest.approx((87.34 + 0.69) / 2, abs=0.01)
    assert ours.NTXentLoss(0.01)(x, labels).item() == pytest.approx((200 + 0.69) / 2, abs=0.01)


def test_rows_whose_loss_underflows_stay_in_the_mean(library):
    x, labels = rows_of_pairs()
    x, labels = torch.cat((x, torch.tensor([[1.0, 0.5]]))), torch.tensor([0, 0, 1, 1, 2, 2])
    exact = ours.sup_con_of_rows(x.double(), labels, None, None, 0.01).mean()
    for dtype in (torch.float64, torch.float32):
        found = ours.SupConLoss(0.01)(x.to(dtype), labels)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)
        for theirs in (library.SupConLoss(0.01), ours.SupConLoss(0.01, strict=True)):
            assert theirs(x.to(dtype), labels) > 1.9 * exact


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss", "TripletMarginLoss"])
def test_what_is_not_streamed_runs_the_library_with_one_warning(library, name, monkeypatch):
    from pytorch_metric_learning.distances import SNRDistance

    from ssl_kernels.adapters import _shared

    monkeypatch.setattr(_shared, "_warned", set())
    x, labels = rows(), torch.arange(12) // 3
    mine, theirs = (getattr(space, name)(distance=SNRDistance()) for space in (ours, library))
    with pytest.warns(
        UserWarning, match=f"{name}: pytorch_metric_learning's own code runs, .* do not cover "
    ):
        assert torch.equal(mine(x, labels), theirs(x, labels))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine(x, labels)


def test_a_miners_pairs_run_the_library(library):
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    x, labels = rows(), torch.arange(12) // 3
    pairs = MultiSimilarityMiner()(x, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(ours.NTXentLoss()(x, labels, pairs), library.NTXentLoss()(x, labels, pairs))


def test_states_go_both_ways(library):
    memories = [space.CrossBatchMemory(space.NTXentLoss(), 8, 20) for space in (ours, library)]
    memories[1](rows(), torch.arange(12) // 3)
    memories[0].load_state_dict(memories[1].state_dict())
    memories[1].load_state_dict(memories[0].state_dict())
    assert torch.equal(memories[0].embedding_memory, memories[1].embedding_memory)
    learned = torch.nn.Parameter(torch.tensor(0.1))
    assert list(ours.NTXentLoss(learned).state_dict()) == list(library.NTXentLoss(learned).state_dict())


def test_a_mask_without_a_true_does_not_fill_the_memory(library):
    memory = ours.CrossBatchMemory(ours.NTXentLoss(), 8, 20)
    loss = memory(rows(), torch.arange(12) // 3, enqueue_mask=torch.zeros(12, dtype=torch.bool))
    assert loss == 0 and not memory.has_been_filled


@pytest.mark.parametrize("name", ["NTXentLoss", "SupConLoss"])
def test_the_row_of_a_batch_of_one_is_not_its_own_positive(library, name):
    """The library takes such a batch for one that goes round the ring, and keeps the pair of the row with itself."""
    memories = [space.CrossBatchMemory(getattr(space, name)(0.2), 8, 20) for space in (ours, library)]
    memories.append(ours.CrossBatchMemory(getattr(ours, name)(0.2, strict=True), 8, 20))
    for memory in memories:
        memory(rows(), torch.arange(12) // 3)
    x = rows(1, seed=1)
    mine, theirs, strict = (memory(x, torch.tensor([1])) for memory in memories)
    assert torch.equal(strict, theirs) and not torch.allclose(mine, theirs)
    memory, labels = rows(), torch.arange(12) // 3
    pairs = [torch.tensor(part) for part in ([0] * 3, [3, 4, 5], [0] * 9, [0, 1, 2, *range(6, 12)])]
    expected = getattr(library, name)(0.2)(x, torch.tensor([1]), pairs, memory, labels)
    torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


TRIPLETS = (torch.tensor([0, 1, 2, 0, -1]), torch.tensor([2, 3, 2, 5, 4]), torch.tensor([4, 5, 1, -2, 4]))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("integers", [torch.int64, torch.int32])
def test_given_triplets_are_one_node(normalize, integers):
    """Of a row twice, of one that is its own positive or negative, and counted from the end."""
    x, margin = rows(6).double().requires_grad_(), 0.6
    index = [part.to(integers) for part in TRIPLETS]
    found = ours.triplet_margins(x, x, index, margin, normalize)
    assert "TripletLoss" in found.grad_fn.name()
    other = x.detach().clone().requires_grad_()  # gathers the rows
    composed = ours.triplet_margins(x, other, index, margin, normalize)
    assert "TripletLoss" not in composed.grad_fn.name() and (found == 0).any() and (found > 0).any()
    torch.testing.assert_close(found, composed, rtol=1e-12, atol=1e-12)
    weight = torch.arange(1.0, 6, dtype=torch.float64)
    (by_x,) = torch.autograd.grad((weight * found).sum(), x, retain_graph=True)
    parts = torch.autograd.grad((weight * composed).sum(), (x, other))
    torch.testing.assert_close(by_x, sum(parts), rtol=1e-10, atol=1e-12)
    unit = torch.nn.functional.normalize(x, dim=1) if normalize else x
    a, p, n = (unit[part.long()] for part in index)
    exact = torch.relu((a - p).norm(dim=1) - (a - n).norm(dim=1) + margin)
    (expected,) = torch.autograd.grad((weight * exact).sum(), x)
    torch.testing.assert_close(by_x, expected, rtol=1e-8, atol=1e-10)


def test_given_triplets_differentiate_twice_and_by_their_margin():
    x, margin = rows(6).double().requires_grad_(), torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    index = [part[[0, 1, 3]] for part in TRIPLETS]
    assert torch.autograd.gradcheck(lambda *at: ours.triplet_margins(at[0], at[0], index, at[1]), (x, margin))
    assert torch.autograd.gradgradcheck(lambda at: ours.triplet_margins(at, at, index, 0.6), (x,))


def test_given_triplets_of_rows_that_are_not_there():
    x = rows(6)
    for index in (6, -7):
        with pytest.raises(IndexError, match=rf"indices must be in \[-6, 6\), got {index}$"):
            ours.triplet_margins(x, x, [torch.tensor([index])] * 3, 0.1)


def test_bfloat16_triplets(library):
    """The library has no distances of it on the CPU."""
    x = rows().bfloat16().requires_grad_()
    triplets = [torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4, 5])]
    ours.TripletMarginLoss(margin=2.0)(x, None, triplets).backward()
    assert x.grad.isfinite().all() and x.grad.any()
