"""Every loss against its definition in float64: values, gradients, reductions, dtypes, edges, memory."""

import functools
import inspect
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import ssl_kernels
from ssl_kernels import losses
from ssl_kernels.losses import _softmax
from ssl_kernels.recipes.memory import peak_memory
from tests.helpers import BACKENDS, DTYPES, OPERATORS, random_rows, same_bits, saved_bytes
from tests.losses.cases import CASES, call, on_backends, value_and_gradients

MB = 1 << 20
ONE_A_LOSS = list({case.loss: case for case in CASES}.values())  # the last case of each, which does the most
every_loss = pytest.mark.parametrize("case", ONE_A_LOSS, ids=str)
every_loss_and_operator = pytest.mark.parametrize(
    "case, backend", on_backends(ONE_A_LOSS, OPERATORS), ids=str
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_case_and_backend = pytest.mark.parametrize("case, backend", on_backends(CASES, BACKENDS), ids=str)
every_case_and_operator = pytest.mark.parametrize("case, backend", on_backends(CASES, OPERATORS), ids=str)


def case_named(name):
    return next(case for case in CASES if case.name == name)


def weights_of_either_sign(count, seed=0):
    weight = random_rows(count, 1, torch.float64, seed=seed)[:, 0]
    weight[::5] = 0
    return weight


# Values and gradients


@every_case_and_backend
@pytest.mark.parametrize("n, d", [(1, 3), (7, 1), (37, 16)])
def test_rows_and_gradients_of_weighted_sums_are_the_definitions(case, backend, n, d):
    arguments = case.arguments(n, d)
    rows = len(case.definition(**arguments))
    weight = weights_of_either_sign(rows)
    expected = value_and_gradients(case.definition, case, arguments, weight)
    found = value_and_gradients(case.ours(backend, reduction="none"), case, arguments, weight)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@every_case_and_operator
def test_rows_shorter_than_eps_are_only_scaled(case, backend):
    """As F.normalize has it: x / eps with a gradient of grad / eps, along the row too."""
    arguments = case.arguments(9, 4)
    with torch.no_grad():
        for value in case.leaves(arguments).values():
            if value.dim() >= 2:
                value.view(-1, value.shape[-1])[[0, -1]] *= 1e-14
    weight = weights_of_either_sign(len(case.definition(**arguments))) + 0.5
    expected = value_and_gradients(case.definition, case, arguments, weight)
    found = value_and_gradients(case.ours(backend, reduction="none"), case, arguments, weight)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-7, atol=1e-9)


@every_case_and_operator
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_are_those_of_the_rows(case, backend, reduction):
    arguments = case.arguments(19, 5)
    weight = None
    each = case.definition(**arguments).detach()
    if case.loss == "sup_con_loss":  # rows without a positive do not count
        weight = (arguments["labels"][:, None] == arguments["labels"]).sum(1) > 1
        weight = weight.to(each.dtype)
        assert 0 < weight.sum() < len(each)
    else:
        weight = torch.ones_like(each)
    if reduction == "mean":
        weight = weight / weight.sum()
    expected = value_and_gradients(case.definition, case, arguments, weight)
    expected[0] = (each * weight).sum()
    found = value_and_gradients(case.ours(backend, reduction=reduction), case, arguments)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-9)


@every_loss_and_operator
def test_row_weights(case, backend):
    if "row_weights" not in inspect.signature(getattr(losses, case.loss)).parameters:
        pytest.skip("has none")
    arguments = case.arguments(19, 5)
    each = case.definition(**arguments)
    weight = random_rows(len(each), 1, torch.float64)[:, 0].abs()
    weight[::4] = 0
    weight.requires_grad_()
    leaves = [*case.leaves(arguments).values(), weight]
    counted = weight
    if case.loss == "sup_con_loss":
        counted = weight * ((arguments["labels"][:, None] == arguments["labels"]).sum(1) > 1)
    expected = {
        "none": each * weight,
        "sum": (each * weight).sum(),
        "mean": (each * weight).sum() / counted.sum(),
    }
    for reduction, value in expected.items():
        found = case.ours(backend, reduction=reduction, row_weights=weight)(**arguments)
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-9)
        seed = (
            random_rows(len(each), 1, torch.float64, seed=4)[:, 0] if value.dim() else torch.ones_like(value)
        )
        truth = torch.autograd.grad(value, leaves, seed, retain_graph=True)
        for ours, exact in zip(torch.autograd.grad(found, leaves, seed), truth, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:sup_con_loss")
@every_case_and_operator
def test_gradcheck(case, backend):
    if "hardness" in case.name:
        pytest.skip("a part of its logits is a constant to the gradient")
    arguments = case.arguments(4, 2, seed=3)
    leaves = case.leaves(arguments)

    def of_leaves(*values):
        return case.ours(backend, reduction="none")(**arguments | dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradcheck(of_leaves, tuple(leaves.values()), fast_mode=len(leaves) > 3)


@every_case_and_operator
@pytest.mark.parametrize("dtype", [*DTYPES[1:3], pytest.param(DTYPES[3], marks=pytest.mark.slow)], ids=str)
def test_no_worse_than_plain_pytorch_in_the_same_dtype(case, backend, dtype):
    arguments = case.arguments(40, 24, dtype)
    wide = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    weight = weights_of_either_sign(len(case.definition(**wide)))
    truth = value_and_gradients(case.definition, case, wide, weight)
    plain = value_and_gradients(case.definition, case, arguments, weight)
    found = value_and_gradients(case.ours(backend, reduction="none"), case, arguments, weight)
    names = ["value", *case.leaves(arguments)]
    for name, ours, theirs, value in zip(names, found, plain, truth, strict=True):
        largest = value.abs().max().item()
        logit = (4 if case.scalar in ("margin", None) else 4 / 0.3) * (24 if "raw" in case.name else 1)
        rounding = torch.finfo(dtype).eps * max(largest, logit * (name == "value"))
        error, plain_error = ((t.double() - value).abs().max().item() for t in (ours, theirs))
        factor = (
            16 if value.dim() == 0 else 4
        )  # the gradient by a scalar sums terms of all rows, which cancel
        assert error <= 2 * plain_error + factor * rounding, name


@every_loss_and_operator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_shapes(case, backend, dtype):
    arguments = case.arguments(9, 8, dtype)
    rows = len(case.definition(**arguments))
    for reduction in ("mean", "sum", "none"):
        loss = case.ours(backend, reduction=reduction)(**arguments)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert loss.shape == ((rows,) if reduction == "none" else ())
    loss.sum().backward()
    for leaf in case.leaves(arguments).values():
        assert leaf.grad.dtype == leaf.dtype and leaf.grad.shape == leaf.shape


@every_loss_and_operator
def test_learns_through_every_operand_alone(case, backend):
    """Each leaf's gradient is the same when it is the only one asked for."""
    arguments = case.arguments(12, 6)
    loss = case.ours(backend)
    value = loss(**arguments)
    together = torch.autograd.grad(value, list(case.leaves(arguments).values()))
    for name, gradient in zip(case.leaves(arguments), together, strict=True):
        frozen = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
        frozen[name].requires_grad_()
        loss(**frozen).backward()
        torch.testing.assert_close(frozen[name].grad, gradient)
        assert all(leaf.grad is None for other, leaf in case.leaves(frozen).items() if other != name)


def test_byol_gives_the_target_no_gradient():
    prediction, target = (random_rows(9, 4, seed=seed).requires_grad_() for seed in (0, 1))
    losses.byol_loss(prediction, target).backward()
    assert prediction.grad.abs().max() > 0 and target.grad is None


@every_loss_and_operator
def test_any_strides(case, backend):
    arguments = case.arguments(21, 8, torch.float32)
    expected = value_and_gradients(case.ours(backend), case, arguments)
    turned = {
        name: value.detach().mT.contiguous().mT.requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.dim() > 1
        else value
        for name, value in arguments.items()
    }
    found = value_and_gradients(case.ours(backend), case, turned)
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, other)


@every_loss_and_operator
def test_repeated_calls_are_equal_bit_for_bit(case, backend):
    arguments = case.arguments(70, 40, torch.float32)
    first = value_and_gradients(case.ours(backend), case, arguments)
    again = value_and_gradients(case.ours(backend), case, arguments)
    assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


SECOND = ("info_nce-unpaired", "sup_con", "triplet_margin", "triplet_margin-cosine", "byol")


@pytest.mark.parametrize("name", SECOND)
def test_second_derivative_is_right(name):
    """Of those that write out their gradient."""
    case = case_named(name)
    arguments = case.arguments(5, 3)
    leaves = case.leaves(arguments)

    def of_leaves(*values):
        return case.ours("reference")(**arguments | dict(zip(leaves, values, strict=True)))

    assert torch.autograd.gradgradcheck(of_leaves, tuple(leaves.values()))


def test_second_derivative_of_a_kernel_is_an_error():
    arguments = case_named("sup_con").arguments(5, 3)
    loss = case_named("sup_con").ours("native")(**arguments)
    (grad,) = torch.autograd.grad(loss, arguments["features"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), arguments["features"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nan_reaches_the_loss(case):
    arguments = case.arguments(9, 4, torch.float32, requires_grad=False)
    next(iter(case.leaves(arguments).values()))[1, 0] = torch.nan
    assert case.ours()(**arguments).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_a_negative_reaches_every_row_of_debiased(backend):
    z0, z1 = random_rows(5, 4), random_rows(5, 4, seed=1)
    z0[1, 0] = torch.nan
    assert losses.debiased_nt_xent_loss(z0, z1, reduction="none", backend=backend).isnan().all()


# Edges


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


# Memory


def peak_of_a_step(case, backend, n):
    """Bytes at the worst moment, and those of one matrix of n × n logits."""
    arguments = case.arguments(n, 8, torch.float32)
    return peak_memory(lambda: case.ours(backend)(**arguments).backward()), 4 * n * n


@every_case
def test_memory_of_a_step_is_below_one_matrix_of_logits(case):
    """N × N for one-view losses, 2N × 2N or N × 2N for the others; of rows this narrow no logits are kept."""
    peak, matrix = peak_of_a_step(case, "native", 3500)
    assert peak < 0.85 * matrix


@pytest.mark.slow
@every_case
def test_memory_of_a_step_in_plain_pytorch(case):
    """Blocks of 16 MB, a few at a time."""
    peak, matrix = peak_of_a_step(case, "chunked", 8000)
    assert peak < 100 * MB < matrix


@every_loss_and_operator
def test_saved_memory_is_linear_in_the_batch(case, backend):
    """Embeddings, their normalised rows where terms are made from them, a few numbers a row."""
    arguments = case.arguments(1500, 16, torch.float32)
    inputs = sum(leaf.nbytes for leaf in arguments.values() if isinstance(leaf, torch.Tensor))
    assert saved_bytes(case.ours(backend), **arguments) < 10 * inputs


# Modules


MODULES = {
    "info_nce_loss": ssl_kernels.nn.InfoNCELoss,
    "clip_loss": ssl_kernels.nn.CLIPLoss,
    "sup_con_loss": ssl_kernels.nn.SupConLoss,
    "dcl_loss": ssl_kernels.nn.DCLLoss,
    "debiased_nt_xent_loss": ssl_kernels.nn.DebiasedNTXentLoss,
    "nt_xent_loss": ssl_kernels.nn.NTXentLoss,
    "imix_loss": ssl_kernels.nn.IMixLoss,
    "triplet_margin_loss": ssl_kernels.nn.TripletMarginLoss,
    "byol_loss": ssl_kernels.nn.BYOLLoss,
    "alignment_loss": ssl_kernels.nn.AlignmentLoss,
    "distillation_loss": ssl_kernels.nn.DistillationLoss,
    "mil_nce_loss": ssl_kernels.nn.MILNCELoss,
    "multiple_negatives_ranking_loss": ssl_kernels.nn.MultipleNegativesRankingLoss,
    "sampled_softmax_loss": ssl_kernels.nn.SampledSoftmaxLoss,
    "similarity_cross_entropy": ssl_kernels.nn.SimilarityCrossEntropyLoss,
}


@every_case
def test_module_is_the_function(case):
    arguments = case.arguments(9, 5)
    held = dict(case.options)
    if case.scalar in ("temperature", "margin", "scale"):
        held[case.scalar] = arguments[case.scalar]
    given = {name: value for name, value in arguments.items() if name not in held}
    for options in ({}, {"reduction": "none"}, {"normalize": False}):
        module = MODULES[case.loss](**held | options)
        assert same_bits(call(module, **given), call(getattr(losses, case.loss), **given, **held | options))
        again = pickle.loads(pickle.dumps(module.requires_grad_(False)))
        assert repr(again) == repr(module)


@every_case
def test_module_with_defaults_is_the_function_with_defaults(case):
    arguments = case.arguments(9, 5)
    held = {name for name, _ in case.options} | {"temperature", "margin", "scale"}
    given = {name: value for name, value in arguments.items() if name not in held}
    if case.loss == "info_nce_loss" and arguments.get("negative_mode") == "paired":
        return
    assert same_bits(call(MODULES[case.loss](), **given), call(getattr(losses, case.loss), **given))


@pytest.mark.parametrize(
    "name", ["info_nce_loss", "sup_con_loss", "dcl_loss", "debiased_nt_xent_loss", "imix_loss"]
)
def test_module_learns_its_temperature(name):
    case = next(case for case in CASES if case.loss == name)
    module = MODULES[name](nn.Parameter(torch.tensor(0.3)))
    arguments = case.arguments(12, 5, torch.float32)
    del arguments["temperature"]
    module(**arguments).backward()
    assert module.temperature.grad.abs() > 0
    assert list(module.state_dict()) == ["temperature"]


def test_backends_are_told_for_every_loss():
    for case in CASES:
        tensors = [v for v in case.arguments(5, 4).values() if isinstance(v, torch.Tensor)]
        assert ssl_kernels.backends_for(getattr(losses, case.loss), *tensors)["chunked"] is None


# Bad input

X = torch.ones(4, 8)
LABELS = torch.zeros(4, dtype=torch.long)
ORDER = torch.arange(4)
BAD_CALLS = [
    ("info_nce_loss", (X, X[:3]), {}, ValueError, "positive_key must have 4 rows as query has, got 3"),
    (
        "info_nce_loss",
        (X, X, X[:, :7]),
        {},
        ValueError,
        "negative_keys must have width 8 as query has, got 7",
    ),
    ("info_nce_loss", (X, X, X[None]), {}, ValueError, r"negative_keys must have shape \(N, D\)"),
    ("info_nce_loss", (X, X, X.double()), {}, TypeError, "negative_keys must be float32 as query is"),
    (
        "info_nce_loss",
        (X, X, X),
        {"negative_mode": "paired"},
        ValueError,
        r"negative_keys must have shape \(4, M, 8\) with M >= 1, got \(4, 8\)",
    ),
    (
        "info_nce_loss",
        (X, X, X),
        {"negative_mode": "all"},
        ValueError,
        'negative_mode must be "unpaired" or "paired", got \'all\'',
    ),
    (
        "info_nce_loss",
        (X, X, X),
        {"symmetric": True},
        ValueError,
        "symmetric must be False with negative_keys",
    ),
    (
        "info_nce_loss",
        (X, X),
        {"key_ids": LABELS},
        ValueError,
        "query_ids must be given with key_ids, got None",
    ),
    (
        "info_nce_loss",
        (X, X, X),
        {"query_ids": LABELS},
        ValueError,
        "key_ids must be given with query_ids and negative_keys",
    ),
    (
        "info_nce_loss",
        (X, X, X),
        {"query_ids": LABELS, "key_ids": LABELS[:3]},
        ValueError,
        r"key_ids must have shape \(4,\), got \(3,\)",
    ),
    (
        "info_nce_loss",
        (X, X),
        {"query_ids": X[:, 0]},
        TypeError,
        "query_ids must be an integer tensor, got float32",
    ),
    (
        "info_nce_loss",
        (X, X),
        {"temperature": 0.0},
        ValueError,
        "temperature must be finite and > 0, got 0.0",
    ),
    ("clip_loss", (X, X, math.inf), {}, ValueError, "logit_scale must be finite, got inf"),
    (
        "clip_loss",
        (X, X[:2], 1.0),
        {},
        ValueError,
        "text_features must have 4 rows as image_features has, got 2",
    ),
    (
        "clip_loss",
        (X, X, 1.0),
        {"label_smoothing": 1.5},
        ValueError,
        r"label_smoothing must be in \[0, 1\], got 1.5",
    ),
    (
        "clip_loss",
        (X, X, 1.0),
        {"label_smoothing": "a"},
        TypeError,
        "label_smoothing must be a number, got str",
    ),
    (
        "clip_loss",
        (X, X, 1.0),
        {"label_smoothing": 0.1, "ids": LABELS},
        ValueError,
        "label_smoothing must be 0 with ids, got 0.1",
    ),
    (
        "info_nce_loss",
        (X, X, X[:, None]),
        {"negative_mode": "paired", "backend": "bogus"},
        ValueError,
        'backend must be "native", "triton", "chunked", "reference" or None, got \'bogus\'',
    ),
    ("sup_con_loss", (X, LABELS[:3]), {}, ValueError, r"labels must have shape \(4,\), got \(3,\)"),
    ("sup_con_loss", (X, X[:, 0]), {}, TypeError, "labels must be an integer tensor, got float32"),
    ("sup_con_loss", (X, X[:, :2]), {}, TypeError, "labels must be integers or bool, got float32"),
    ("sup_con_loss", (X, LABELS[:3, None]), {}, ValueError, r"labels must have shape \(4,\), got \(3, 1\)"),
    (
        "sup_con_loss",
        (X, torch.full((4, 3), 2)),
        {},
        ValueError,
        "labels of several columns must be 0 or 1, got 2",
    ),
    ("sup_con_loss", (X, None), {}, ValueError, "labels must be given without positives, got None"),
    (
        "sup_con_loss",
        (X, LABELS),
        {"positives": torch.ones(4, 4).bool()},
        ValueError,
        "labels must be None with positives",
    ),
    (
        "sup_con_loss",
        (X, None),
        {"positives": torch.ones(4, 3).bool()},
        ValueError,
        r"positives must have shape \(4, 4\), got \(4, 3\)",
    ),
    (
        "sup_con_loss",
        (X, None),
        {"positives": torch.ones(4, 4)},
        TypeError,
        "positives must be bool or integers, got float32",
    ),
    ("sup_con_loss", (X, LABELS), {"unlabelled": 0.5}, TypeError, "unlabelled must be an integer or None"),
    (
        "sup_con_loss",
        (X, torch.ones(4, 3).long()),
        {"unlabelled": -1},
        ValueError,
        "unlabelled must be None with several labels a row, got -1",
    ),
    ("sup_con_loss", (X, [0, 0, 1, 1]), {}, TypeError, "labels must be a tensor, got list"),
    ("sup_con_loss", (X, LABELS.to("meta")), {}, ValueError, "labels must be on cpu, got meta"),
    (
        "dcl_loss",
        (X[:1], X[:1]),
        {},
        ValueError,
        "z0 must have at least 2 rows, so that a negative is left, got 1",
    ),
    ("debiased_nt_xent_loss", (X[:1], X[:1]), {}, ValueError, "z0 must have at least 2 rows"),
    (
        "debiased_nt_xent_loss",
        (X, X),
        {"positive_prior": 1.0},
        ValueError,
        r"positive_prior must be in \[0, 1\), got 1.0",
    ),
    (
        "imix_loss",
        (X, X, torch.tensor([0, 1, 1, 2]), 0.5),
        {},
        ValueError,
        r"permutation must hold each of 0 to 3 once, got \[0, 1, 1, 2\]",
    ),
    ("imix_loss", (X, X, ORDER[:3], 0.5), {}, ValueError, r"permutation must have shape \(4,\), got \(3,\)"),
    ("imix_loss", (X, X, X[:, 0], 0.5), {}, TypeError, "permutation must be an integer tensor, got float32"),
    ("imix_loss", (X, X, ORDER, 1.5), {}, ValueError, r"lam must be in \[0, 1\], got 1.5"),
    (
        "imix_loss",
        (X, X, ORDER, 2 * X[:, 0]),
        {},
        ValueError,
        r"lam must be in \[0, 1\], got 2",
    ),
    ("imix_loss", (X, X, ORDER, X[:3, 0]), {}, ValueError, r"lam must have shape \(4,\), got \(3,\)"),
    ("imix_loss", (X, X, ORDER, ORDER), {}, TypeError, "lam must be a floating tensor, got int64"),
    ("triplet_margin_loss", (X, X, X[:2]), {}, ValueError, "negative must have 4 rows as anchor has, got 2"),
    ("triplet_margin_loss", (X, X, X, -0.1), {}, ValueError, "margin must be >= 0, got -0.1"),
    (
        "triplet_margin_loss",
        (X, X, X),
        {"distance": "l1"},
        ValueError,
        'distance must be "euclidean" or "cosine", got \'l1\'',
    ),
    ("byol_loss", (X, X.half()), {}, TypeError, "target must be float32 as prediction is, got float16"),
    ("byol_loss", (X, X[:2]), {}, ValueError, "target must have 4 rows as prediction has, got 2"),
    (
        "byol_loss",
        (X, X),
        {"row_weights": X[:3, 0]},
        ValueError,
        r"row_weights must have shape \(4,\), got \(3,\)",
    ),
    (
        "byol_loss",
        (X, X),
        {"row_weights": LABELS},
        TypeError,
        "row_weights must be a floating tensor, got int64",
    ),
]


REACHED = ("contrastive", "class_contrastive", "one_node", "row_pairs", "row_pairs_loss", "paired_logits")


@pytest.fixture
def nothing_runs(monkeypatch):
    """Fails the test if an operation is reached."""

    def fail(*_, **__):
        pytest.fail("the operation ran on bad input")

    modules = [inspect.getmodule(getattr(losses, case.loss)) for case in CASES]
    for module in (*modules, _softmax):
        for operation in REACHED:
            if hasattr(module, operation):
                monkeypatch.setattr(module, operation, fail)


@every_case
def test_every_loss_reaches_an_operation(case, nothing_runs):
    """So that `nothing_runs` can fail."""
    with pytest.raises(pytest.fail.Exception, match="the operation ran"):
        call(getattr(losses, case.loss), **case.arguments(6, 4))


@pytest.mark.parametrize("loss, arguments, options, error, message", BAD_CALLS)
def test_bad_input_is_named(loss, arguments, options, error, message, nothing_runs):
    with pytest.raises(error, match=f"^{loss}: {message}"):
        getattr(losses, loss)(*arguments, **options)


@every_case
def test_bad_options_of_every_loss_are_named(case):
    arguments = case.arguments(4, 3)
    with pytest.raises(ValueError, match=f"^{case.loss}: reduction must be .* got 'avg'"):
        case.ours(reduction="avg")(**arguments)
    if "negative_mode" not in arguments:
        with pytest.raises(ValueError, match=f"^{case.loss}: backend must be .* or None, got 'cuda'"):
            case.ours("cuda")(**arguments)
    name = next(iter(case.leaves(arguments)))
    with pytest.raises(TypeError, match=f"^{case.loss}: {name} must be float64, float32, .* got int64"):
        case.ours()(**arguments | {name: arguments[name].detach().long()})


@every_case
def test_autocast_takes_embeddings_of_two_dtypes(case):
    arguments = case.arguments(9, 4, torch.float32, requires_grad=False)
    name = next(iter(case.leaves(arguments)))
    mixed = arguments | {name: arguments[name].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        found = case.ours()(**mixed)
    expected = case.ours()(**mixed | {name: mixed[name].float()} if case.loss != "sup_con_loss" else mixed)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
