"""Every public function and module on CPU tensors beside another default device: nothing is made where it lies.

A tensor made without a device would be on "meta", where it has no values.
"""

import copy
import inspect

import pytest
import torch

import ssl_kernels
from ssl_kernels import nn
from ssl_kernels.nn import ManifoldMixup, Mixup, MoCoQueue, MomentumEncoder
from tests.helpers import BACKENDS
from tests.losses.cases import CASES, OTHER_CASES
from tests.support.mixing import random_permutation

ALL = CASES + OTHER_CASES


def everything(value):
    """All tensors in a result."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return (
        [tensor for each in value for tensor in everything(each)] if isinstance(value, (tuple, list)) else []
    )


def check_elsewhere(call):
    """The same results with default device "meta"."""
    expected = everything(call())
    with torch.device("meta"):
        found = everything(call())
    assert expected and len(found) == len(expected)
    for ours, beside in zip(found, expected, strict=True):
        assert ours.device.type == "cpu"
        torch.testing.assert_close(ours, beside, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_losses(case, backend):
    arguments = case.arguments(6, 5, torch.float32)
    leaves = list(case.leaves(arguments).values())

    def call():
        loss = case.ours(backend)(**arguments)
        return loss, torch.autograd.grad(loss, leaves)

    check_elsewhere(call)


@pytest.mark.parametrize("case", ALL, ids=str)
def test_definitions(case):
    arguments = case.arguments(6, 5, torch.float64)
    check_elsewhere(lambda: case.definition(**arguments))


X, ORDER = torch.randn(6, 3, 5, 4), random_permutation(6)
BOXES = torch.tensor([[0, 3, 1, 4]]).expand(6, 4)
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
MIXING = {
    "mixup": (X, 0.3, ORDER),
    "mixup_": (X, 0.3, ORDER),
    "cutmix": (X, BOXES, ORDER),
    "cutmix_": (X, BOXES, ORDER),
    "mixup_normalize": (torch.zeros(6, 3, 5, 4, dtype=torch.uint8), 0.3, ORDER, MEAN, STD),
    "mixup_cross_entropy": (torch.randn(6, 5), torch.arange(6) % 5, ORDER, 0.3),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MIXING)
def test_mixing(name, backend):
    function = getattr(ssl_kernels, name)

    def call():
        arguments = [each.clone() if isinstance(each, torch.Tensor) else each for each in MIXING[name]]
        grads = [
            each.requires_grad_() for each in arguments[:1] if each.is_floating_point() and name[-1] != "_"
        ]
        result = function(*arguments, backend=backend)
        return result, torch.autograd.grad(result.sum(), grads) if grads else ()

    check_elsewhere(call)


def encoder():
    torch.manual_seed(0)
    with torch.device("cpu"):
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(60, 7), torch.nn.Linear(7, 5))


MODULES = {
    "Mixup": lambda backend, training: Mixup(
        0.5, 0.5, num_classes=5, mode="sample", generator=1, backend=backend
    ),
    "Mixup of bytes": lambda backend, training: Mixup(0.5, mean=MEAN, std=STD, generator=1, backend=backend),
    "Mixup by sides": lambda backend, training: Mixup(
        0, 1, (0.1, 0.9), mode="pair", generator=1, backend=backend
    ),
    "ManifoldMixup": lambda backend, training: ManifoldMixup(encoder(), ["1"], generator=1, backend=backend),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("made_beside", [True, False])
def test_mixing_modules(name, backend, training, made_beside):
    """Made beside the default device or before it was set; also a copy, and one that goes on from a state."""
    made = MODULES[name](backend, training).train(training)
    target = torch.arange(6) % 5

    def call():
        module = MODULES[name](backend, training).train(training) if made_beside else copy.deepcopy(made)
        x = (X * 60).to(torch.uint8) if name == "Mixup of bytes" else X.clone()
        results = [module(x.clone(), target)]
        module.load_state_dict(module.state_dict())
        return [*results, module(x, target), list(module.state_dict().values())]

    check_elsewhere(call)


def test_queue_and_average():
    """Made on the CPU, used and saved beside another default device."""
    queue, average = MoCoQueue(8, 5), MomentumEncoder(encoder(), 0.9)
    online = encoder()

    def call():
        ours, averaged = copy.deepcopy(queue), copy.deepcopy(average)
        ours.push_(torch.nn.functional.normalize(X.view(6, 60)[:, :5], dim=1))
        averaged.update_(online)
        averaged.load_state_dict(averaged.state_dict())
        return (
            ours.keys,
            averaged(X),
            [v for v in averaged.state_dict().values() if isinstance(v, torch.Tensor)],
        )

    check_elsewhere(call)


def test_all_of_the_public_interface_is_here():
    tried = {*MIXING, *(case.loss for case in ALL)}
    others = {
        "nn",
        "backends_for",
        "use_backend",
        "empty_cache",
        "matryoshka",
        "adapters",
        "grad_cache",
        "patch",
        "sinkhorn",
    }
    assert tried | others == set(ssl_kernels.__all__)
    modules = {name for name in nn.__all__ if inspect.isclass(getattr(nn, name))}
    losses = {name for name in modules if name.endswith("Loss")}
    results = {"MixingDraw", "MixedMasks", "MixedBoxes"}
    assert modules - losses - results == {
        "Mixup",
        "ManifoldMixup",
        "MoCoQueue",
        "MomentumEncoder",
        "DINOCenter",
    }
