"""Every loss against its definition in float64: values, gradients, reductions, dtypes, edges, memory."""

import inspect
import pickle
import sys

import pytest
import torch
from torch import nn

import ssl_kernels
from ssl_kernels import losses
from ssl_kernels.losses._module import Loss
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


@every_case
def test_autocast_takes_embeddings_of_two_dtypes(case):
    arguments = case.arguments(9, 4, torch.float32, requires_grad=False)
    name = next(iter(case.leaves(arguments)))
    mixed = arguments | {name: arguments[name].bfloat16()}
    with torch.autocast("cpu", torch.bfloat16):
        found = case.ours()(**mixed)
    expected = case.ours()(**mixed | {name: mixed[name].float()} if case.loss != "sup_con_loss" else mixed)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


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
    """Embeddings, their normalised rows where terms are made from them, a few numbers per row."""
    arguments = case.arguments(1500, 16, torch.float32)
    inputs = sum(leaf.nbytes for leaf in arguments.values() if isinstance(leaf, torch.Tensor))
    assert saved_bytes(case.ours(backend), **arguments) < 10 * inputs


# Modules


def module_of(function):
    """The nn.Module that stands beside a loss in its file."""
    named = vars(sys.modules[function.__module__])
    (made,) = [
        each
        for each in named.values()
        if isinstance(each, type) and issubclass(each, Loss) and each is not Loss
    ]
    return made


MODULES = {name: module_of(getattr(losses, name)) for name in losses.__all__}


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
