"""Reduced losses that are one node of autograd on the CPU and make their gradients in the forward: SwAV of few logits,
and pairs of rows whose margins and exponents are numbers."""

import pytest
import torch

from ssl_kernels import losses
from ssl_kernels.recipes.memory import peak_memory
from tests.helpers import BACKENDS, random_rows
from tests.losses import cluster_definitions, definitions

every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum"])


def rows(n, d, seed=0, dtype=torch.float64):
    return random_rows(n, d, dtype, seed=seed)


def agree(found, expected, leaves, tolerance=1e-9):
    """Value and gradients, of a graph that is used twice with gradients other than 1 and once more with 1."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for factor, keeps in ((3.0, True), (1.0, True), (-2.0, False)):
        ours, truth = (
            torch.autograd.grad(
                loss, leaves, torch.full_like(loss, factor), retain_graph=keeps or loss is expected
            )
            for loss in (found, expected)
        )
        for one, exact in zip(ours, truth, strict=True):
            torch.testing.assert_close(one, exact, rtol=tolerance, atol=tolerance)


PAIRED = {
    "triplet": (losses.triplet_margin_loss, definitions.triplet_margin_loss, 3, {"margin": 0.3}),
    "triplet-raw": (
        losses.triplet_margin_loss,
        definitions.triplet_margin_loss,
        3,
        {"margin": 0.3, "normalize": False},
    ),
    "triplet-cosine": (
        losses.triplet_margin_loss,
        definitions.triplet_margin_loss,
        3,
        {"margin": 0.3, "distance": "cosine"},
    ),
    "byol": (losses.byol_loss, definitions.byol_loss, 2, {}),
    "byol-raw": (losses.byol_loss, definitions.byol_loss, 2, {"normalize": False}),
    "alignment": (losses.alignment_loss, definitions.alignment_loss, 2, {}),
    "alignment-1.5": (losses.alignment_loss, definitions.alignment_loss, 2, {"alpha": 1.5}),
    "alignment-raw": (losses.alignment_loss, definitions.alignment_loss, 2, {"alpha": 3, "normalize": False}),
}


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("n, d", [(1, 1), (7, 5), (300, 67)])
@every_reduction
def test_pairs_by_numbers(name, n, d, reduction):
    ours, definition, count, options = PAIRED[name]
    inputs = [rows(n, 2 * d, seed)[:, ::2].requires_grad_() for seed in range(count)]
    leaves = inputs[:1] if "byol" in name else inputs
    found = ours(*inputs, reduction=reduction, **options)
    assert "RowPairsLoss" in found.grad_fn.name()
    agree(found, getattr(definition(*inputs, **options), reduction)(), leaves)


@pytest.mark.parametrize("frozen", range(3))
def test_a_frozen_row_of_a_triplet_gets_nothing(frozen):
    inputs = [rows(9, 6, seed).requires_grad_(seed != frozen) for seed in range(3)]
    leaves = [x for x in inputs if x.requires_grad]
    agree(losses.triplet_margin_loss(*inputs), definitions.triplet_margin_loss(*inputs).mean(), leaves)


def test_pairs_at_distance_0_and_values_that_are_not_finite():
    x = rows(4, 6, dtype=torch.float32)
    y = x.clone()
    y[1] *= 3  # the same direction
    y[2, 3], y[3] = torch.nan, 0
    x, y = x.requires_grad_(), y.requires_grad_()
    assert losses.alignment_loss(x[:2], y[:2]) <= 1e-13
    assert (torch.autograd.grad(losses.alignment_loss(x[:1], y[:1]), x)[0] == 0).all()
    loss = losses.triplet_margin_loss(x, y, -y)
    assert loss.isnan()
    by_x = torch.autograd.grad(loss, x)[0]
    assert by_x[2].isnan().all() and by_x[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_lengths_whose_squares_leave_float32(factor):
    inputs = [(factor * rows(5, 9, seed, torch.float32)).requires_grad_() for seed in range(3)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, expected = losses.triplet_margin_loss(*inputs), definitions.triplet_margin_loss(*wide).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    for ours, truth in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, wide), strict=True
    ):
        torch.testing.assert_close(ours.double() * factor, truth * factor, rtol=1e-5, atol=1e-6)


def test_a_pair_of_dtypes_other_than_float32_or_64_is_rounded_once():
    inputs = [rows(64, 8, seed, torch.float16).requires_grad_() for seed in range(3)]
    loss = losses.triplet_margin_loss(*inputs)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    expected = definitions.triplet_margin_loss(*wide).mean()
    for ours, truth in zip(
        torch.autograd.grad(loss * 65536, inputs),
        torch.autograd.grad(expected * 65536, wide),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-3, atol=1e-1)


# SwAV


def swav_leaves(n, k, views=3, d=6, dtype=torch.float64):
    return rows(views * n, d, 1, dtype).view(views, n, d).requires_grad_(), rows(
        k, d, 2, dtype
    ).requires_grad_()


@pytest.mark.parametrize("options", [
    {},
    {"epsilon": 1e-3},  # by logarithms
    {"assign": (2,), "iterations": 1},
    {"normalize": False, "normalize_prototypes": False, "epsilon": 0.5, "assign": (2, 0, 1), "iterations": 5},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("n, k", [(1, 1), (5, 9), (45, 33)])
@every_reduction
def test_swav_is_the_definition(options, n, k, reduction):
    """Of samples that fill no block, one and several, in a tensor and in a list of views."""
    features, prototypes = swav_leaves(n, k)
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    weights = rows(n, 1, 3)[:, 0].abs().requires_grad_()
    each = cluster_definitions.swav_loss(features, prototypes, temperature, **options)
    leaves = [features, prototypes, temperature, weights]
    expected = (each * weights).sum()
    expected = expected / weights.sum() if reduction == "mean" else expected
    for given in (features, list(features.unbind(0))):
        found = losses.swav_loss(
            given, prototypes, temperature, reduction=reduction, row_weights=weights, **options
        )
        agree(found, expected, leaves)


def test_swav_of_frozen_inputs():
    features, prototypes = swav_leaves(5, 9)
    for one, other in ((features, prototypes.detach()), (features.detach(), prototypes)):
        leaf = one if one.requires_grad else other
        expected = cluster_definitions.swav_loss(one, other).mean()
        agree(losses.swav_loss(one, other), expected, [leaf])
    only_one = [features[0], features.detach()[1], features.detach()[2]]
    agree(
        losses.swav_loss(only_one, prototypes),
        cluster_definitions.swav_loss(only_one, prototypes).mean(),
        [features],
    )
    with torch.no_grad():
        loss = losses.swav_loss(features, prototypes)
    torch.testing.assert_close(loss, cluster_definitions.swav_loss(features, prototypes).mean().detach())


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e-14, 1e8, 1e25])
def test_swav_of_prototypes_of_any_length(factor):
    """One of which is 0, or so far from 1 that products with it leave float32's range."""
    features, prototypes = swav_leaves(5, 9, dtype=torch.float32)
    prototypes = (prototypes.detach() * torch.tensor([factor] + [1.0] * 8)[:, None]).requires_grad_()
    wide = [x.detach().double().requires_grad_() for x in (features, prototypes)]
    found, expected = losses.swav_loss(features, prototypes), cluster_definitions.swav_loss(*wide).mean()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    ours, truth = torch.autograd.grad(found, [features, prototypes]), torch.autograd.grad(expected, wide)
    torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1][1:].double(), truth[1][1:], rtol=1e-4, atol=1e-5)
    scale = max(factor, 1e-12)
    torch.testing.assert_close(ours[1][0].double() * scale, truth[1][0] * scale, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_swav_of_what_is_not_finite_is_nan(backend):
    features, prototypes = swav_leaves(4, 6)
    for value in (torch.nan, torch.inf):
        broken = features.detach().clone()
        broken[0, 1, 2] = value
        assert losses.swav_loss(broken, prototypes, backend=backend).isnan()


def test_swav_keeps_gradients_alone():
    """Logits would be 12 MB: what is allocated beyond the gradients is gone once the forward is done."""
    features, prototypes = swav_leaves(128, 8192, d=8, dtype=torch.float32)

    def step():
        torch.autograd.grad(losses.swav_loss(features, prototypes), (features, prototypes))

    step()
    assert peak_memory(step) < 24 << 20  # logits, those of the teacher, gradients


# Another teacher


@pytest.mark.parametrize("n, k, width", [(1, 1, 1), (5, 9, 3), (45, 33, 8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@every_reduction
def test_distillation_is_the_definition(n, k, width, dtype, reduction):
    query, keys = rows(n, 6, 1, dtype).requires_grad_(), rows(k, 6, 2, dtype).requires_grad_()
    teacher = rows(n, width, 3, dtype), rows(k, width, 4, dtype)
    temperature = torch.tensor(0.2, dtype=dtype, requires_grad=True)
    weights = rows(n, 1, 5)[:, 0].abs().requires_grad_()
    leaves = [query, keys, temperature, weights]
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in (query, keys, *teacher, temperature)]
    each = definitions.distillation_loss(*wide[:4], wide[4], 0.3)
    expected = (each * weights).sum() / (weights.sum() if reduction == "mean" else 1)
    found = losses.distillation_loss(
        query, keys, *teacher, temperature, 0.3, reduction=reduction, row_weights=weights
    )
    truth = torch.autograd.grad(expected, [*wide[:2], wide[4], weights])
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for ours, exact in zip(torch.autograd.grad(found, leaves), truth, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_distillation_from_itself_is_0(backend):
    """Cross-entropy less entropy, of probabilities that are 0 in part."""
    query, keys = rows(4, 3, 1).requires_grad_(), rows(50, 3, 2).requires_grad_()
    loss = losses.distillation_loss(query, keys, query.detach(), keys.detach(), 1e-3, backend=backend)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-9)
    for grad in torch.autograd.grad(loss, (query, keys)):
        torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-8)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("frozen", [None, "student", "prototypes"])
def test_dino_of_features_is_the_definition(centred, frozen):
    student = [rows(7, 5, seed).requires_grad_(frozen != "student") for seed in (1, 2, 3)]
    prototypes = rows(11, 5, 4).requires_grad_(frozen != "prototypes")
    teacher, columns = [rows(7, 4, seed) for seed in (5, 6)], rows(11, 4, 7)
    center = rows(1, 11, 8)[0] if centred else None
    call = student, teacher, prototypes, columns, 0.2, 0.3
    leaves = [x for x in (*student, prototypes) if x.requires_grad]
    found = losses.dino_loss(*call, center=center)
    assert "ClusterLoss" in found.grad_fn.name()
    agree(found, cluster_definitions.dino_loss(*call, center=center).mean(), leaves)


def test_the_nearest_rows_of_koleo_get_both_gradients():
    x = rows(40, 5, 1).requires_grad_()
    agree(losses.koleo_loss(x), losses.koleo_loss(x, backend="reference"), [x])
