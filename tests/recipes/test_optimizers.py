import math

import pytest
import torch

from ssl_kernels.recipes.engine import Settings
from ssl_kernels.recipes.optimizers import LARS, make_optimizer, make_schedule


def test_lars_follows_its_definition():
    """Three steps of a matrix and a bias in float64, beside the formula."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, 4, dtype=torch.float64, generator=generator).requires_grad_()
    bias = torch.randn(3, dtype=torch.float64, generator=generator).requires_grad_()
    optimizer = LARS([matrix, bias], lr=0.3, momentum=0.8, weight_decay=0.1, trust=0.02)
    w, b = matrix.detach().clone(), bias.detach().clone()
    v, u = torch.zeros_like(w), torch.zeros_like(b)
    for step in range(3):
        matrix.grad, bias.grad = (step + 1) * matrix.detach().cos(), bias.detach().sin()
        g = (step + 1) * w.cos() + 0.1 * w
        v = 0.8 * v + g * 0.02 * w.square().sum().sqrt() / g.square().sum().sqrt()
        u = 0.8 * u + b.sin()
        w, b = w - 0.3 * v, b - 0.3 * u
        optimizer.step()
        torch.testing.assert_close(matrix.detach(), w)
        torch.testing.assert_close(bias.detach(), b)


def test_lars_takes_weights_and_gradients_of_zero_as_they_are():
    at_zero = torch.zeros(2, 2, requires_grad=True)
    without_gradient = torch.ones(2, 2, requires_grad=True)
    untouched = torch.ones(2, 2, requires_grad=True)
    at_zero.grad, without_gradient.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LARS([at_zero, without_gradient, untouched], lr=0.5).step()
    assert torch.equal(at_zero, torch.full((2, 2), -0.5))
    assert torch.equal(without_gradient, torch.ones(2, 2))
    assert torch.equal(untouched, torch.ones(2, 2))


@pytest.mark.parametrize(
    "name, kind", [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("lars", LARS)]
)
def test_settings_name_the_optimizer(name, kind):
    settings = Settings("simclr", "digits", 1, 8, learning_rate=0.25, optimizer=name, weight_decay=0.125)
    optimizer = make_optimizer([torch.zeros(1, requires_grad=True)], settings)
    assert type(optimizer) is kind
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.25, 0.125)
    own = {"adamw": {}, "sgd": {"momentum": 0.9}, "lars": {"momentum": 0.9, "trust": 1e-3}}[name]
    assert optimizer.defaults == kind([torch.zeros(1)], lr=0.25, weight_decay=0.125, **own).defaults


def test_learning_rate_rises_and_falls():
    weight = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=3e-3)
    schedule = make_schedule(optimizer, warmup=0.05, steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    top = rates.index(max(rates))
    assert 0.9 * 3e-3 < max(rates) <= 3e-3
    assert 3 <= top <= 6
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[50] == pytest.approx(1.5e-3)
    assert rates[75] == pytest.approx(3e-3 * 0.5 * (1 + math.cos(0.75 * math.pi)))
    assert 0 < rates[-1] < 1e-5


@pytest.mark.parametrize("warmup, steps", [(0.0, 5), (0.05, 100), (0.3, 20), (1.0, 4)])
def test_every_rate_is_that_of_the_definition(warmup, steps):
    """A rise from one part to all of warmup · steps + 1, times half a cosine."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-3)
    schedule = make_schedule(optimizer, warmup, steps)
    for step in range(steps):
        rise = 1.0 if warmup == 0 else min(1.0, (step + 1) / (warmup * steps + 1))
        expected = 3e-3 * rise * math.cos(math.pi * step / steps / 2) ** 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected)
        optimizer.step()
        schedule.step()
