"""Losses at their edges: extreme temperatures, equal rows, nothing left to compare with, float16 near overflow."""

import functools
import math
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import ssl_kernels
from ssl_kernels import adapters, losses
from ssl_kernels.warning import warn
from tests.helpers import BACKENDS, random_rows, same_bits
from tests.losses.cases import value_and_gradients
from tests.losses.test_losses import case_named, every_case_and_operator, every_loss_and_operator


@every_case_and_operator
@pytest.mark.parametrize("scalar", [1e-3, 1e3])
def test_extreme_temperatures_are_exact(case, backend, scalar):
    if case.scalar not in ("temperature", "logit_scale", "scale") or "raw" in case.name:
        pytest.skip("has no temperature of unit rows")
    wide = case.arguments(30, 16, torch.float64, scalar=scalar)
    arguments = case.arguments(30, 16, torch.float32, scalar=scalar)
    for name, leaf in case.leaves(arguments).items():
        wide[name] = leaf.detach().double().requires_grad_()
    if "debiased" in case.name and scalar < 1:  # the definition's own exponentials overflow
        found = case.ours(backend, reduction="none")(**arguments)
        expected = case.ours(backend, reduction="none")(**wide)
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6 / scalar)
        assert expected.isfinite().all()
        return
    truth = value_and_gradients(case.definition, case, wide, 1.0)
    found = value_and_gradients(case.ours(backend, reduction="none"), case, arguments, 1.0)
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-5, atol=1e-6 / scalar)
    for ours, value in zip(found[1:], truth[1:], strict=True):
        # The softmax of logits up to 1000 inherits their rounding.
        close = {"rtol": 1e-3 / min(scalar, 1) * 1e-2, "atol": 1e-4 * value.abs().max().item() + 1e-12}
        torch.testing.assert_close(ours.double(), value, **close)


@every_loss_and_operator
def test_float16_near_overflow(case, backend):
    """Rows of lengths that float16 cannot hold, and that its squares leave by far."""
    if "raw" in case.name:
        pytest.skip("products of such rows overflow by definition")
    arguments = case.arguments(12, 64, torch.float64, requires_grad=False)
    for name, leaf in case.leaves(arguments).items():
        if leaf.dim() > 1:
            arguments[name] = leaf * (65504 / leaf.abs().amax())
    if case.loss == "byol_loss":
        arguments["target"] = arguments["target"] * 1e4
    half = {
        name: value.half() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    wide = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in half.items()
    }
    for leaf in case.leaves(half).values():
        leaf.requires_grad_()
    loss = case.ours(backend)(**half)
    expected = case.ours("reference")(**wide)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-3, abs=2e-3)
    loss.backward()
    assert all(leaf.grad.isfinite().all() for leaf in case.leaves(half).values())


@every_loss_and_operator
def test_equal_rows(case, backend):
    arguments = case.arguments(11, 6, requires_grad=False)
    for leaf in case.leaves(arguments).values():
        if leaf.dim() > 1:
            leaf[:] = torch.arange(6)
    for leaf in case.leaves(arguments).values():
        leaf.requires_grad_()
    rows = len(case.definition(**arguments))
    expected = value_and_gradients(case.definition, case, arguments, torch.ones(rows))
    found = value_and_gradients(case.ours(backend, reduction="none"), case, arguments, torch.ones(rows))
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sup_con_with_one_label_for_all(backend):
    case = case_named("sup_con")
    arguments = case.arguments(16, 5)
    arguments["labels"][:] = 3
    expected = value_and_gradients(case.definition, case, arguments, torch.ones(16))
    found = value_and_gradients(case.ours(backend, reduction="none"), case, arguments, torch.ones(16))
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sup_con_without_any_positive_is_zero_and_warns(backend):
    arguments = case_named("sup_con").arguments(6, 5) | {"labels": torch.arange(6)}
    for reduction in ("mean", "sum", "none"):
        with pytest.warns(UserWarning, match="sup_con_loss: no row has another of its label"):
            loss = losses.sup_con_loss(**arguments, reduction=reduction, backend=backend)
        assert (loss == 0).all()
        features, temperature = torch.autograd.grad(
            loss.sum(), [arguments["features"], arguments["temperature"]]
        )
        assert (features == 0).all() and temperature == 0


@every_case_and_operator
def test_values_that_are_read_with_their_sign_turned(case, backend):
    """As `c.conj().imag` of complex c are. Only torch's dispatcher turns it, and kernels may be called past that."""
    for dtype in (torch.float64, torch.float32):
        plain = case.arguments(6, 5, dtype)
        turned = {
            name: torch._neg_view(value.detach().neg().requires_grad_(value.requires_grad))
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for name, value in plain.items()
        }
        expected = value_and_gradients(case.ours(backend), case, plain, torch.tensor(-2, dtype=dtype))
        for given in (plain, turned):
            value = case.ours(backend)(**given)
            weight = torch._neg_view(torch.full_like(value, 2))
            found = torch.autograd.grad(value, list(case.leaves(given).values()), weight)
            for truth, ours in zip(expected, (value, *found), strict=True):
                torch.testing.assert_close(ours.resolve_neg(), truth)


def test_numbers_of_numpy_are_numbers():
    z0, z1 = random_rows(6, 4), random_rows(6, 4, seed=1)
    half = np.float32(0.5)
    for name, options in {
        "nt_xent_loss": {"temperature": half},
        "debiased_nt_xent_loss": {"temperature": half, "positive_prior": half},
        "info_nce_loss": {"temperature": half},
        "clip_loss": {"logit_scale": half, "label_smoothing": half},
        "siglip_loss": {"logit_scale": half, "logit_bias": half},
        "imix_loss": {"permutation": torch.arange(6).flip(0), "lam": half, "temperature": half},
    }.items():
        loss = getattr(losses, name)
        plain = {key: 0.5 if value is half else value for key, value in options.items()}
        found, expected = loss(z0, z1, **options), loss(z0, z1, **plain)
        assert isinstance(found, torch.Tensor) and same_bits(found, expected), name
    with pytest.raises(TypeError, match="temperature must be a number or a tensor of one element, got bool"):
        losses.nt_xent_loss(z0, z1, True)


def test_sup_con_without_any_positive_is_zero_where_no_value_is_looked_at(monkeypatch):
    """On CUDA and under torch.compile: a warning would have to wait for the device, so there is none."""
    arguments = case_named("sup_con").arguments(6, 5) | {"labels": torch.arange(6)}
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = losses.sup_con_loss(**arguments)
    assert loss == 0
    for grad in torch.autograd.grad(loss, [arguments["features"], arguments["temperature"]]):
        assert (grad == 0).all()


def test_sup_con_of_a_single_row_is_zero():
    with pytest.warns(UserWarning, match="sup_con_loss: "):
        assert losses.sup_con_loss(torch.ones(1, 3), torch.tensor([4])).item() == 0


def test_a_warning_names_the_line_that_called():
    """Of a function, of modules, which torch calls, and of a library that calls an adapter."""
    x, labels = torch.ones(2, 3), torch.arange(2)
    library = types.ModuleType("pretended_library")
    exec("def call(function): return function()", vars(library))
    calls = (
        lambda: losses.sup_con_loss(x, labels),
        lambda: losses.sup_con_loss(x, labels, backend="chunked"),
        lambda: ssl_kernels.nn.SupConLoss()(x, labels),
        lambda: adapters.sup_contrast.SupConLoss()(x[:, None], labels),
        lambda: library.call(functools.partial(warn, "sup_con_loss", beyond=("pretended_library",))),
    )
    for call in calls:
        with pytest.warns(UserWarning, match="sup_con_loss") as found:
            call()
        line = call.__code__.co_firstlineno
        assert (found[0].filename, found[0].lineno) == (__file__, line)


def test_sup_con_does_not_warn_when_there_is_a_positive():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        losses.sup_con_loss(torch.randn(3, 2), torch.tensor([1, 0, 1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["info_nce-unpaired-ids", "info_nce-paired-ids", "info_nce-symmetric-ids"])
def test_info_nce_with_every_negative_left_out(name, backend):
    """All ids equal: nothing is left but the own key, so the loss is 0 and so are all gradients, temperature's too."""
    case = case_named(name)
    arguments = case.arguments(7, 4)
    arguments |= {key: torch.zeros_like(value) for key, value in arguments.items() if key.endswith("_ids")}
    value, *gradients = value_and_gradients(case.ours(backend), case, arguments)
    assert value.abs() < 1e-12
    assert all((gradient.abs() < 1e-12).all() for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_clip_with_all_ids_equal_is_zero(backend):
    case = case_named("clip-ids")
    arguments = case.arguments(7, 4) | {"ids": torch.full((7,), 3)}
    value, *gradients = value_and_gradients(case.ours(backend), case, arguments)
    assert value.abs() < 1e-12
    assert all((gradient.abs() < 1e-12).all() for gradient in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_debiased_reaches_its_lower_bound(backend):
    """Positives so near that the corrected sum is negative: then G is the bound, and its gradient the temperature's."""
    case = case_named("debiased")
    arguments = case.arguments(6, 8)
    z0, z1 = (arguments[name].detach() for name in ("z0", "z1"))
    z1[:3] = z0[:3] + 1e-3
    z1[3:] *= -1
    arguments |= {"z1": z1.requires_grad_(), "positive_prior": 0.6}
    each = case.definition(**arguments)
    log_negatives = each.expm1().log() + torch.cosine_similarity(z0, z1).repeat(2) / 0.3
    at_least = log_negatives < math.log(10) - 1 / 0.3 + 1e-6
    assert at_least.tolist() == [True, True, True, False, False, False] * 2
    expected = value_and_gradients(case.definition, case, arguments, torch.ones(12))
    found = value_and_gradients(case.ours(backend, reduction="none"), case, arguments, torch.ones(12))
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-9)


def test_identical_rows_of_triplets_have_gradient_zero():
    a = torch.ones(3, 4, requires_grad=True)
    losses.triplet_margin_loss(a, a.detach(), a.detach()).backward()
    assert (a.grad == 0).all()


def test_label_smoothing_is_that_of_cross_entropy():
    arguments = case_named("clip").arguments(13, 5)
    image, text = (
        nn.functional.normalize(arguments[name], dim=1) for name in ("image_features", "text_features")
    )
    logits = arguments["logit_scale"] * image @ text.T
    plain = functools.partial(nn.functional.cross_entropy, target=torch.arange(13), label_smoothing=0.3)
    expected = (plain(logits) + plain(logits.T)) / 2
    torch.testing.assert_close(losses.clip_loss(**arguments, label_smoothing=0.3), expected)


def test_debiased_without_a_prior_is_nt_xent():
    arguments = case_named("nt_xent").arguments(13, 5)
    found = losses.debiased_nt_xent_loss(**arguments, positive_prior=0.0)
    torch.testing.assert_close(found, losses.nt_xent_loss(**arguments))


def test_sup_con_of_two_views_is_nt_xent():
    arguments = case_named("nt_xent").arguments(13, 5)
    features = torch.cat((arguments["z0"], arguments["z1"]))
    found = losses.sup_con_loss(features, torch.arange(13).repeat(2), arguments["temperature"])
    torch.testing.assert_close(found, losses.nt_xent_loss(**arguments))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8], ids=str)
def test_labels_and_ids_of_narrow_integers(dtype):
    arguments = case_named("info_nce-unpaired-ids").arguments(9, 4)
    narrow = arguments | {key: arguments[key].to(dtype) for key in ("query_ids", "key_ids")}
    assert same_bits(losses.info_nce_loss(**narrow), losses.info_nce_loss(**arguments))
    labels = torch.tensor([0, 1, 0, 2, 2, 1, 0, 7, 7])
    found = losses.sup_con_loss(arguments["query"], labels.to(dtype))
    assert same_bits(found, losses.sup_con_loss(arguments["query"], labels))
