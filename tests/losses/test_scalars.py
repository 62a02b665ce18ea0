"""Numbers that a loss takes: temperatures, scales, biases, margins, as numbers and as tensors, and their limits."""

import inspect
import math
import typing

import numpy as np
import pytest
import torch

from ssl_kernels import losses
from tests.helpers import BACKENDS, same_bits
from tests.losses.cases import CASES, OTHER_CASES, on_backends

ELSEWHERE = {"alignment_loss", "uniformity_loss"}  # whose numbers are in test_retrieval.py
WITH_SCALAR = [case for case in CASES + OTHER_CASES if case.scalar]
ONE_A_LOSS = list({case.loss: case for case in WITH_SCALAR}.values())
every_case = pytest.mark.parametrize("case", WITH_SCALAR, ids=str)
every_loss = pytest.mark.parametrize("case", ONE_A_LOSS, ids=str)
every_loss_and_backend = pytest.mark.parametrize("case, backend", on_backends(ONE_A_LOSS, BACKENDS), ids=str)
POSITIVE = [case for case in ONE_A_LOSS if case.scalar == "temperature"]
every_loss_with_a_temperature = pytest.mark.parametrize("case", POSITIVE, ids=str)


def test_every_loss_with_a_number_is_here():
    """That is each with an argument that may be a float or a tensor."""
    takes = {
        loss
        for loss in losses.__all__
        for argument in inspect.signature(getattr(losses, loss)).parameters.values()
        if {float, torch.Tensor} <= set(typing.get_args(argument.annotation))
    }
    assert {case.loss for case in WITH_SCALAR} == takes - ELSEWHERE


def scalars(case, arguments):
    """Names of what is learned and no embedding."""
    return [name for name, leaf in case.leaves(arguments).items() if leaf.dim() == 0]


@every_loss_and_backend
@pytest.mark.parametrize("shape", [(1,), (1, 1)], ids=str)
def test_one_element_of_any_shape_is_a_number(case, backend, shape):
    arguments = case.arguments(9, 5, torch.float32)
    names = scalars(case, arguments)
    assert case.scalar in names
    shaped = arguments | {name: arguments[name].detach().view(shape).requires_grad_() for name in names}
    found, expected = case.ours(backend)(**shaped), case.ours(backend)(**arguments)
    assert found.shape == () and same_bits(found, expected)
    by_shaped = torch.autograd.grad(found, [shaped[name] for name in names])
    for ours, plain in zip(
        by_shaped, torch.autograd.grad(expected, [arguments[name] for name in names]), strict=True
    ):
        assert ours.shape == shape and same_bits(ours.view(()), plain)
    assert case.ours(backend, reduction="none")(**shaped).dim() == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_share_of_any_shape(backend):
    case = next(case for case in CASES if case.name == "imix")
    arguments = case.arguments(9, 5)
    expected = case.ours(backend, reduction="none")(**arguments | {"lam": 0.3})
    lam = torch.tensor([0.3], dtype=torch.float64, requires_grad=True)
    found = case.ours(backend, reduction="none")(**arguments | {"lam": lam})
    assert same_bits(found, expected)
    found.sum().backward()
    assert lam.grad.shape == (1,)


@every_loss
@pytest.mark.parametrize("number", [np.float32(0.5), np.float16(0.5), np.int64(1), 1], ids=repr)
def test_numbers_of_every_kind(case, number):
    arguments = case.arguments(6, 4, torch.float32, requires_grad=False)
    found = case.ours()(**arguments | {case.scalar: number})
    assert same_bits(found, case.ours()(**arguments | {case.scalar: float(number)}))


@every_loss_with_a_temperature
@pytest.mark.parametrize("dtype, temperature", [(torch.float32, 1e-45), (torch.float64, 1e-310)], ids=str)
def test_a_temperature_whose_inverse_overflows_is_an_error(case, dtype, temperature):
    arguments = case.arguments(6, 4, dtype, requires_grad=False)
    for value in (temperature, torch.tensor(temperature, dtype=dtype)):
        with pytest.raises(ValueError, match=f"^{case.loss}: temperature must be at least .* with float"):
            case.ours()(**arguments | {"temperature": value})


@every_loss_with_a_temperature
@pytest.mark.parametrize("temperature", [1e-38, 1e-30, 1e38, 1e300, 10**300], ids=str)
def test_extreme_temperatures_are_right(case, temperature):
    """As float64 has it; where the logits leave float32, infinite or 0."""
    arguments = case.arguments(6, 4, torch.float32, requires_grad=False)
    wide = {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }
    found = case.ours()(**arguments | {"temperature": temperature})
    expected = case.ours()(**wide | {"temperature": float(temperature)})
    assert found.isfinite() or expected > 3e37  # the sum of a few rows leaves float32
    if found.isfinite():
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)


@every_loss_with_a_temperature
@pytest.mark.parametrize("value", [10**400, math.inf, math.nan], ids=str)
def test_a_temperature_that_is_not_finite_is_an_error(case, value):
    arguments = case.arguments(6, 4, torch.float32, requires_grad=False)
    with pytest.raises(ValueError, match=f"^{case.loss}: temperature must be finite and > 0, got (inf|nan)"):
        case.ours()(**arguments | {"temperature": value})


@every_loss_with_a_temperature
@pytest.mark.parametrize("value", [0.0, -0.5, -math.inf])
def test_a_temperature_that_is_not_positive_is_an_error_as_a_tensor_too(case, value):
    arguments = case.arguments(6, 4, torch.float32, requires_grad=False)
    for temperature in (value, torch.tensor(value), torch.nn.Parameter(torch.tensor([value]))):
        with pytest.raises(
            ValueError, match=f"^{case.loss}: temperature must be finite and > 0, got {value}"
        ):
            case.ours()(**arguments | {"temperature": temperature})


@pytest.mark.parametrize("loss", ["triplet", "triplet_margin"])
def test_a_negative_margin_is_an_error_as_a_tensor_too(loss):
    case = next(case for case in WITH_SCALAR if case.name == loss)
    arguments = case.arguments(6, 4, torch.float32)
    for margin in (-0.5, torch.tensor(-0.5), torch.tensor([-0.5])):
        with pytest.raises(ValueError, match=f"^{case.loss}: margin must be >= 0, got -0.5"):
            case.ours()(**arguments | {"margin": margin})


@pytest.mark.parametrize("case", [case for case in ONE_A_LOSS if case not in POSITIVE], ids=str)
def test_a_number_that_float32_cannot_hold_is_an_error(case):
    arguments = case.arguments(6, 4, torch.float32)
    with pytest.raises(ValueError, match=f"^{case.loss}: {case.scalar} must be at most 1.7e.38 in size"):
        case.ours()(**arguments | {case.scalar: 1e39})


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_tensor_that_is_not_finite_reaches_the_loss(value):
    z0, z1 = torch.ones(2, 3), torch.eye(2, 3)
    loss = losses.nt_xent_loss(z0, z1, torch.tensor(value))
    assert loss.isnan() if math.isnan(value) else loss.item() == pytest.approx(math.log(3))


def test_negative_mode_is_not_read_without_negatives():
    z = torch.eye(4)
    assert same_bits(losses.info_nce_loss(z, z, negative_mode=None), losses.info_nce_loss(z, z))
    with pytest.raises(ValueError, match="negative_mode must be"):
        losses.info_nce_loss(z, z, z, negative_mode=None)
