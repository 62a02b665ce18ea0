"""torch.compile of every loss function and module: no graph break, and few graphs whatever changes from call to call.

The mixing functions and modules are in tests/test_compile_mixing.py, the averages and queues beside their tests.
"""

import inspect

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import ssl_kernels
from ssl_kernels import losses, nn
from ssl_kernels.losses._module import Loss
from tests.helpers import OPERATORS, random_rows
from tests.losses.cases import CASES, OTHER_CASES, grouped

CALLS = 12
MOST_GRAPHS = 3  # the first call, a number or size that changed, and one to spare
ALL = {case.name: case for case in CASES + OTHER_CASES}
# A case of each form that a loss has; the others take a few options away.
FORMS = (
    "nt_xent",
    "info_nce-symmetric-ids",
    "info_nce-unpaired-ids",
    "info_nce-paired-ids",
    "moco",
    "clip-smoothed",
    "clip-ids",
    "siglip",
    "sup_con",
    "dcl",
    "debiased",
    "imix-queue",
    "triplet",
    "triplet-cosine",
    "triplet_margin",
    "nt_xent-ids",
    "moco-ids",
    "clip-texts",
    "triplet-soft",
    "triplet-semi_hard",
    "mnrl",
    "mnrl-hardness",
    "similarity",
    "sampled_softmax",
    "mil_nce",
    "distillation",
    "alignment",
    "koleo",
    "uniformity",
    "byol",
    "swav-queue",
    "dino",
    "dino-logits",
    "dino-sinkhorn",
    "barlow_twins",
    "vicreg",
    "mae",
)
FORMS += tuple(
    next(case.name for case in ALL.values() if case.loss == loss)
    for loss in sorted(set(losses.__all__) - {ALL[name].loss for name in FORMS})
)
NN_LOSSES = [
    module
    for module in (getattr(nn, name) for name in nn.__all__)
    if isinstance(module, type) and issubclass(module, Loss)
]
SLOW = dict.fromkeys(
    ("clip-ids", "triplet-cosine", "triplet-soft", "moco-ids", "clip-texts", "mnrl-hardness"),
    pytest.mark.slow,
)
# Numbers that meet others before they meet a tensor. With the oldest torch, `.ci/run` has these and no native kernels.
IN_ARITHMETIC = {("reference", name) for name in ("clip-smoothed", "debiased", "uniformity")}
A_GRAPH_FOR_EACH_SIZE = {"triplet-semi_hard"}  # it goes by blocks, and their number is traced
NUMBERS = {
    "temperature": lambda k: 0.2 + 0.01 * k,
    "logit_scale": lambda k: 5.0 - 0.1 * k,
    "logit_bias": lambda k: -1.0 - 0.1 * k,
    "margin": lambda k: 0.3 + 0.01 * k,
    "label_smoothing": lambda k: 0.1 + 0.01 * k,
    "positive_prior": lambda k: 0.1 + 0.01 * k,
    "lam": lambda k: 0.5 - 0.01 * k,
    "scale": lambda k: 5.0 - 0.1 * k,
    "hardness_strength": lambda k: 1.0 + 0.1 * k,
    "alpha": lambda k: 2.0 + 0.1 * k,
    "t": lambda k: 2.0 + 0.1 * k,
    "epsilon": lambda k: 0.2 + 0.01 * k,
    "teacher_temperature": lambda k: 0.3 + 0.01 * k,
    "off_diagonal_weight": lambda k: 0.1 + 0.01 * k,
    "eps": lambda k: 1e-3 + 1e-4 * k,
    "invariance": lambda k: 3.0 + 0.1 * k,
    "variance": lambda k: 3.0 - 0.1 * k,
    "covariance": lambda k: 2.0 + 0.1 * k,
}


def takes(function):
    return set(inspect.signature(function).parameters)


def test_every_loss_and_module_is_here():
    functions = set(losses.__all__)
    assert {name for name in ssl_kernels.__all__ if name.endswith("_loss")} <= functions
    assert functions == {ALL[name].loss for name in FORMS}
    assert set(MODULES.values()) == set(NN_LOSSES)
    for name in functions:  # and every option that is a number
        defaults = inspect.signature(getattr(losses, name)).parameters.values()
        assert {option.name for option in defaults if isinstance(option.default, float)} <= set(NUMBERS)


def arguments_of(case, k, *, numbers=True, sizes=True):
    """Of call k: all numbers, the sizes, the widths, the labels and ids differ from those of other calls, but for what
    compiles a graph for each size."""
    sizes = sizes and case.name not in A_GRAPH_FOR_EACH_SIZE
    n, d = (7 + k, 5 + 2 * k) if sizes else (9, 6)
    arguments = case.arguments(n, d, torch.float32, seed=k)
    if numbers:
        names = takes(getattr(losses, case.loss)) - {"label_smoothing" if "ids" in arguments else ""}
        names -= {name for name, value in case.options if isinstance(value, str)}
        if ("normalize_target", False) in case.options:  # a number without effect becomes a constant
            names -= {"eps"}
        arguments |= {name: NUMBERS[name](k) for name in NUMBERS if name in names}
    return arguments


def graphs(function, of_call, backend="aot_eager", calls=CALLS):
    """How many graphs the calls take; their values and gradients are those without torch.compile."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for k in range(calls):
        arguments = of_call(k)
        leaves = [a for a in arguments.values() if isinstance(a, torch.Tensor) and a.requires_grad]
        found, expected = compiled(**arguments), function(**arguments)
        torch.testing.assert_close(found, expected)
        grads = (torch.autograd.grad(value, leaves) for value in (found, expected))
        for ours, eager in zip(*grads, strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-5)
    return counter.frame_count


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in FORMS])
def test_everything_changes_from_call_to_call(name):
    case = ALL[name]
    assert graphs(case.ours("native"), lambda k: arguments_of(case, k)) <= MOST_GRAPHS


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("backend", "name"),
    [
        pytest.param(
            backend,
            name,
            marks=() if (backend, name) in IN_ARITHMETIC else pytest.mark.slow,
            id=f"{backend}-{name}",
        )
        for backend in (*OPERATORS, "reference")
        for name in ALL
    ],
)
def test_numbers_alone_and_tensors_of_every_case(name, backend):
    case = ALL[name]
    run = case.ours(backend)
    assert graphs(run, lambda k: arguments_of(case, k, sizes=False)) <= MOST_GRAPHS
    assert graphs(run, lambda k: arguments_of(case, k, numbers=False), calls=4) <= MOST_GRAPHS


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMS)
def test_numbers_that_change_with_inductor(name):
    case = ALL[name]
    run = case.ours("native")
    assert graphs(run, lambda k: arguments_of(case, k), backend="inductor") <= MOST_GRAPHS


@pytest.mark.filterwarnings("ignore")
def test_a_diagonal_with_inductor():
    """Backward writes into no matrix that a diagonal is still to be read from: only inductor does."""
    run = ALL["vicreg"].ours("chunked")
    assert graphs(run, lambda k: arguments_of(ALL["vicreg"], k), backend="inductor", calls=1) == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", OPERATORS)
def test_a_tensor_may_be_given_twice(backend):
    def step(x, ids, scale):
        clip = losses.clip_loss(x, x, scale, ids=ids, backend=backend)
        siglip = losses.siglip_loss(x, x, scale, scale, backend=backend)
        mixed = ssl_kernels.mixup_cross_entropy(x, ids, ids, 0.3, backend=backend)
        return clip + siglip + mixed + losses.triplet_margin_loss(x, x, x, backend=backend)

    def of_call(k):
        return {
            "x": random_rows(6, 8).requires_grad_(),
            "ids": torch.tensor([2, 0, 1, 3, 5, 4]),
            "scale": torch.tensor(2.0, requires_grad=True),
        }

    assert graphs(step, of_call, calls=1) == 1


MODULES = {  # a loss's module stands in its file
    name: next(module for module in NN_LOSSES if module.__module__ == getattr(losses, name).__module__)
    for name in losses.__all__
}

LEARN = [name for name, module in MODULES.items() if {"temperature", "margin", "logit_scale"} & takes(module)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, learned", [(name, False) for name in MODULES] + [(name, True) for name in LEARN]
)
def test_modules(name, learned):
    """Numbers of a module that are set anew before each call, or a parameter of shape (1,)."""
    case = next(case for case in ALL.values() if case.loss == name)
    module = MODULES[name](**{key: value for key, value in case.options if key in takes(MODULES[name])})
    held = [option for option in NUMBERS if option in takes(MODULES[name])]
    if learned:
        setattr(module, case.scalar, torch.nn.Parameter(torch.full((1,), NUMBERS[case.scalar](0))))

    def of_call(k):
        if not learned:
            for option in held:
                setattr(module, option, NUMBERS[option](k))
        arguments = grouped(arguments_of(case, k, sizes=False))
        return {key: value for key, value in arguments.items() if key in takes(type(module).forward)}

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for k in range(CALLS):
        arguments = of_call(k)
        torch.testing.assert_close(compiled(**arguments), module(**arguments))
    assert counter.frame_count <= MOST_GRAPHS
