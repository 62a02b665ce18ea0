"""Whole losses on GPU kernels, emulated or on a card: value and gradients against the definition in float64.

The operations are made to take their backend "triton", whose operators are replaced by those that a test gives.
"""

import sys

import pytest
import torch
import torch.nn.functional as F

from ssl_kernels import backends, moco_loss
from ssl_kernels.nn import MoCoQueue
from tests.helpers import random_rows
from tests.losses.cases import CASES, OTHER_CASES, value_and_gradients

# Each calls an operation with other flags, ids and positives; the rest calls them alike.
NAMES = (
    "info_nce-unpaired-ids",
    "clip-smoothed",
    "sup_con",
    "siglip",
    "triplet",
    "triplet_margin",
    "triplet_margin-cosine",
    "byol",
)
ALL = {case.name: case for case in (*CASES, *OTHER_CASES)}
ONE_A_LOSS = {case.loss: case for case in ALL.values() if "raw" not in case.name}
SCALES = ("temperature", "logit_scale", "scale")  # what logits are divided or multiplied by


def _marked(values, fast):
    return [
        pytest.param(value, marks=[] if str(value) in fast else [pytest.mark.slow], id=str(value))
        for value in values
    ]


cases = pytest.mark.parametrize("case", _marked(ALL.values(), NAMES))


class Edge:
    """A loss at an edge: what it is called with, float64, and the dtype of its embeddings on the device."""

    def __init__(self, name, case, n=21, d=24, dtype=torch.float32, scalar=0.3, **changes):
        self.name, self.case, self.dtype = f"{name}-{case}", case, dtype
        arguments = case.arguments(n, d, scalar=scalar, requires_grad=False) | changes
        leaves = case.leaves(arguments)
        if dtype == torch.float16:
            for key, leaf in leaves.items():
                if leaf.dim() > 1:  # the largest entry is float16's, the squares leave it by far
                    arguments[key] = (leaf * (65504 / leaf.abs().amax())).half().double()
        self.arguments = arguments
        self.logit = 1 / scalar if case.scalar in SCALES else 1.0

    def __str__(self):
        return self.name


def _edges():
    for case in ONE_A_LOSS.values():
        if (
            case.loss != "vicreg_loss"
        ):  # its rows are not normalised, and the gradient has the cubes of their entries
            yield Edge("float16", case, dtype=torch.float16)
        # Unit rows of one number are equal, and KoLeo's loss is a logarithm of what rounding leaves between them.
        yield Edge("width-1", case, d=1, **{"normalize": False} if case.loss == "koleo_loss" else {})
        if case.scalar in SCALES:
            yield Edge("temperature-0.001", case, scalar=1e-3)
    same, apart = torch.zeros(21, dtype=torch.int64), torch.arange(21)
    ids = {"query_ids": same, "key_ids": torch.zeros(45, dtype=torch.int64)}
    yield Edge("all-excluded", ALL["info_nce-unpaired-ids"], **ids)
    yield Edge("all-excluded", ALL["info_nce-symmetric-ids"], query_ids=same, key_ids=same)
    yield Edge("all-excluded", ALL["clip-ids"], ids=same)
    yield Edge("no-positive", ALL["sup_con"], labels=apart)
    yield Edge("no-positive", ALL["triplet"], labels=apart)
    yield Edge("one-label", ALL["sup_con"], labels=same)
    yield Edge("one-label", ALL["triplet"], labels=same)


edges = pytest.mark.parametrize(
    "edge",
    _marked(
        _edges(),
        (
            "float16-moco",
            "float16-siglip",
            "temperature-0.001-dcl",
            "width-1-clip-ids",
            "all-excluded-info_nce-unpaired-ids",
        ),
    ),
)


def run_on(monkeypatch, operators):
    """`operators` maps (module of ssl_kernels.ops, name of its table) to the operator."""
    monkeypatch.setattr(backends, "choose_backend", lambda *_, **__: "triton")
    for name, module in list(sys.modules.items()):  # rows as they are, as on CUDA
        if name.startswith("ssl_kernels.losses.") and hasattr(module, "rows_for_several"):
            monkeypatch.setattr(module, "rows_for_several", lambda rows, *_: rows)
    for (operation, table), operator in operators.items():
        monkeypatch.setitem(getattr(operation, table), "triton", operator)


def check_loss(case, device, n=21, d=24):
    """In float32: rows with weights of either sign, and every gradient; about as exact as its products."""
    _check(case, case.arguments(n, d), torch.float32, device, rtol=2e-4, atol=2e-5)


def check_edge(edge, device, monkeypatch):
    """What is left of the digits: those of float16's gradients, and of float32's logits at a small temperature.

    A coefficient is as far off as a logit, and meets the scale of the logits in the gradients: once for each row
    in that of a temperature.
    """
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as on CUDA, no value is looked at
    leaves = edge.case.leaves(edge.arguments).values()
    for leaf in leaves:
        leaf.requires_grad_()
    if edge.dtype == torch.float16:
        tolerances = {"rtol": 4e-3, "atol": 3e-7}
    else:
        tolerances = {"rtol": 2e-4 + 2e-6 * edge.logit, "atol": 2e-5 + 2e-6 * edge.logit}
        if edge.logit > 100:
            tolerances["atol_grad"] = 4 * torch.finfo(torch.float32).eps * edge.logit**2
    _check(edge.case, edge.arguments, edge.dtype, device, **tolerances)


def _check(case, arguments, dtype, device, *, rtol, atol, atol_grad=None):
    shape = case.definition(**arguments).shape  # of uniformity () instead of a value for each row
    rows = shape.numel()
    weight = torch.linspace(-1, 2, rows, dtype=torch.float64).view(shape)
    truth = value_and_gradients(case.definition, case, arguments, weight)
    leaves = case.leaves(arguments)

    def placed(name, value):
        if not isinstance(value, torch.Tensor):
            return value
        to = value.dtype
        if value.is_floating_point():
            to = dtype if value.dim() > 1 else torch.float32
        return value.detach().to(device, to).requires_grad_(name in leaves)

    on_device = {name: placed(name, value) for name, value in arguments.items()}
    loss = case.ours(reduction="none")
    found = value_and_gradients(loss, case, on_device, weight.to(device))
    for name, ours, value in zip(("value", *leaves), found, truth, strict=True):
        ours, at_least = ours.cpu(), atol
        if name != "value" and atol_grad is not None:
            at_least = atol_grad * (rows if value.dim() == 0 else 1)
        if ours.dtype == torch.float16:
            at_least = max(at_least, 2e-3 * value.abs().max().item())
        # The gradient of a short row is as much larger.
        length = arguments[name].detach().norm(dim=1, keepdim=True).clamp(max=1) if value.dim() > 1 else 1
        torch.testing.assert_close(
            ours.double() * length,
            value * length,
            rtol=rtol,
            atol=at_least,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def check_moco(monkeypatch, device, dtype, pushes, contrastive_operators):
    """float32 queries, symmetric, with the keys pushed before backward and rows told apart by ids as on CUDA."""
    queue = MoCoQueue(80, 24, dtype)
    for seed, count in enumerate(pushes):
        queue.push_(random_rows(count, 24, seed=seed))
    negatives = queue.keys.double()
    query, key = (random_rows(20, 24, seed=seed) for seed in (7, 8))
    wide = query.double().requires_grad_()
    unit, positive = F.normalize(wide, dim=1), F.normalize(key.double(), dim=1).roll(10, 0)
    logits = torch.cat(((unit * positive).sum(1, keepdim=True), unit @ negatives.T), 1) / 0.07
    truth = F.cross_entropy(logits, torch.zeros(20, dtype=torch.int64))
    truth.backward()

    queue.to(device)
    query = query.to(device).requires_grad_()
    run_on(monkeypatch, contrastive_operators)
    chosen = {"contrastive": "triton"}
    monkeypatch.setattr(backends, "choose_backend", lambda op, *_, **__: chosen.get(op, "chunked"))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the fill count is not read
    loss = moco_loss(query, key.to(device), queue, 0.07, symmetric=True)
    queue.push_(key.to(device))
    loss.backward()
    torch.testing.assert_close(loss.detach().cpu().double(), truth.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(query.grad.cpu().double(), wide.grad, rtol=1e-4, atol=1e-6)
