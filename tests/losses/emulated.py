"""Whole losses on GPU kernels, emulated or on a card: value and gradients against the definition in float64.

The operations are made to take their backend "triton", whose operators are replaced by those that a test gives.
"""

import pytest
import torch

from ssl_kernels import backends
from tests.losses.cases import CASES, value_and_gradients

# Each calls `contrastive` or `row_pairs` with other flags, ids and positives.
NAMES = (
    "info_nce-unpaired-ids",
    "clip-smoothed",
    "sup_con",
    "triplet_margin",
    "triplet_margin-cosine",
    "byol",
)
SLOW_NAMES = ("info_nce", "info_nce-symmetric-ids", "clip-ids", "dcl", "debiased", "imix-queue")
cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] if case.name in SLOW_NAMES else [])
        for case in CASES
        if case.name in NAMES + SLOW_NAMES
    ],
    ids=str,
)


def run_on(monkeypatch, operators):
    """`operators` maps a module of ssl_kernels.ops to the forward and backward operator."""
    monkeypatch.setattr(backends, "choose_backend", lambda *_: "triton")
    for operation, (forward, backward) in operators.items():
        monkeypatch.setitem(operation._fwd, "triton", forward)
        monkeypatch.setitem(operation._bwd, "triton", backward)


def check_loss(case, device, n=21, d=24):
    """In float32: rows with weights of either sign, and every gradient."""
    arguments = case.arguments(n, d)
    rows = len(case.definition(**arguments))
    weight = torch.linspace(-1, 2, rows, dtype=torch.float64)
    truth = value_and_gradients(case.definition, case, arguments, weight)
    leaves = case.leaves(arguments)
    on_device = {
        name: value.detach()
        .to(device, torch.float32 if value.is_floating_point() else value.dtype)
        .requires_grad_(name in leaves)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in arguments.items()
    }
    loss = case.ours(reduction="none")
    found = value_and_gradients(loss, case, on_device, weight.to(device))
    for name, ours, value in zip(("value", *leaves), found, truth, strict=True):
        torch.testing.assert_close(
            ours.cpu().double(), value, rtol=2e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
