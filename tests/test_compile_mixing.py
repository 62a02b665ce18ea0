"""torch.compile, torch.export and FakeTensorMode of the mixing functions and modules.

Under torch.compile there is no graph break, and few graphs whatever changes from call to call.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode

import ssl_kernels
from ssl_kernels.nn import Mixup
from tests.helpers import BACKENDS
from tests.support.mixing import random_permutation, shares_of

CALLS = 12
MOST_GRAPHS = 3  # the first call, a number or size that changed, and one to spare
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def count_graphs(function, of_call, calls=CALLS):
    """How many graphs the calls take; their results are those without torch.compile."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for k in range(calls):
        expected = function(
            *(each.clone() if isinstance(each, torch.Tensor) else each for each in of_call(k))
        )
        torch.testing.assert_close(compiled(*of_call(k)), expected)
    return counter.frame_count


def boxes_of(batch, height, width):
    generator = torch.Generator().manual_seed(batch)
    spans = [
        torch.randint(size + 1, (batch, 2), generator=generator).sort(1).values for size in (height, width)
    ]
    return torch.cat(spans, 1)


def images(k, dtype=torch.float32):
    x = torch.randn(5 + k, 3, 6 + k, 8, generator=torch.Generator().manual_seed(k))
    return x.to(dtype) if dtype.is_floating_point else (x.abs() * 60).clamp(0, 255).to(dtype)


FUNCTIONS = {
    "mixup": lambda k: (images(k), 0.9 - 0.05 * k, random_permutation(5 + k)),
    "mixup_": lambda k: (images(k), 0.9 - 0.05 * k, random_permutation(5 + k)),
    "cutmix": lambda k: (images(k), boxes_of(5 + k, 6 + k, 8), random_permutation(5 + k)),
    "cutmix_": lambda k: (images(k), boxes_of(5 + k, 6 + k, 8), random_permutation(5 + k)),
    "mixup_normalize": lambda k: (
        images(k, torch.uint8),
        0.9 - 0.05 * k,
        random_permutation(5 + k),
        MEAN,
        STD,
    ),
    "mixup_cross_entropy": lambda k: (
        torch.randn(5 + k, 4 + k, generator=torch.Generator().manual_seed(k)),
        torch.arange(5 + k) % 4,
        random_permutation(5 + k),
        0.9 - 0.05 * k,
    ),
}
TENSORS = {  # the same with λ, mean and std as tensors, λ in float64
    name: lambda k, of_call=of_call: tuple(
        torch.tensor(each)
        if isinstance(each, tuple)
        else shares_of(5 + k).double()
        if isinstance(each, float)
        else each
        for each in of_call(k)
    )
    for name, of_call in FUNCTIONS.items()
}


def on(name, backend):
    def run(*arguments):
        return getattr(ssl_kernels, name)(*arguments, backend=backend)

    return run


@pytest.mark.parametrize(
    "backend", ["native", *(pytest.param(b, marks=pytest.mark.slow) for b in ("chunked", "reference"))]
)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_whose_numbers_and_sizes_change(name, backend):
    assert count_graphs(on(name, backend), FUNCTIONS[name]) <= MOST_GRAPHS


@pytest.mark.parametrize("reduction", ["mean", pytest.param("none", marks=pytest.mark.slow)])
def test_label_smoothing_that_changes(reduction):
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0])

    def loss(logits, target, permutation, lam, smoothing):
        options = {"label_smoothing": smoothing, "weight": weight, "ignore_index": 1, "reduction": reduction}
        return ssl_kernels.mixup_cross_entropy(logits, target, permutation, lam, **options)

    def of_call(k):
        logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(k))
        return logits, torch.arange(6) % 4, random_permutation(6), 0.9 - 0.05 * k, 0.05 * k

    assert count_graphs(loss, of_call) <= MOST_GRAPHS


@pytest.mark.slow
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_whose_tensors_change(name):
    assert count_graphs(on(name, "native"), TENSORS[name]) <= MOST_GRAPHS


@pytest.mark.parametrize("generator", [None, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 4},
        {"cutmix_alpha": 1.0, "mode": "sample"},
        pytest.param(
            {"mixup_alpha": 0.0, "cutmix_alpha": 1.0, "mode": "pair", "inplace": False},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"cutmix_alpha": 1.0, "mean": MEAN, "std": STD, "num_classes": 4, "label_smoothing": 0.1},
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_modules_whose_batches_change(options, generator):
    """The draws of a seed are those without torch.compile."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    plain, module = (Mixup(generator=generator, **options) for _ in range(2))
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for k in range(6):
        x = images(k, torch.uint8 if "mean" in options else torch.float32)[..., :6, :]
        target = torch.arange(len(x)) % 4
        found, expected = compiled(x.clone(), target), plain(x.clone(), target)
        if generator is not None:
            torch.testing.assert_close(found, expected)
        else:
            assert not torch.equal(found[0], x) or "mean" in options
    assert counter.frame_count <= MOST_GRAPHS
    if generator is not None:  # and they go on where compiled calls ended
        torch.testing.assert_close(module(x.clone(), target), plain(x.clone(), target))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cases", [FUNCTIONS, TENSORS], ids=["numbers", "tensors"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mixup", "cutmix", "mixup_normalize"])
def test_exported_programs_take_other_batches(name, backend, cases):
    constants = {i: each for i, each in enumerate(cases[name](1)) if not isinstance(each, torch.Tensor)}

    class Module(torch.nn.Module):
        def forward(self, tensors):
            rest = iter(tensors)
            count = len(tensors) + len(constants)
            return on(name, backend)(*(constants[i] if i in constants else next(rest) for i in range(count)))

    def tensors_of(k):
        found = [each for each in cases[name](1) if isinstance(each, torch.Tensor)]
        batch = 6 + k
        order = torch.arange(batch) % 6
        grown = [each[order] if len(each) == 6 else each for each in found]
        return [
            random_permutation(batch) if each.dtype == torch.int64 and each.dim() == 1 else each
            for each in grown
        ]

    free = [{0: torch.export.Dim.DYNAMIC} if len(each) == 6 else None for each in tensors_of(0)]
    program = torch.export.export(Module(), (tensors_of(0),), dynamic_shapes=(free,), strict=False).module()
    for k in (0, 3, 5):
        torch.testing.assert_close(program(tensors_of(k)), Module()(tensors_of(k)))


@pytest.mark.parametrize("cases", [FUNCTIONS, TENSORS], ids=["numbers", "tensors"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_fake_tensors(name, backend, cases):
    expected = on(name, backend)(*cases[name](1))
    mode = FakeTensorMode()
    arguments = [
        mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in cases[name](1)
    ]
    with mode:
        found = on(name, backend)(*arguments)
    assert found.shape == expected.shape and found.dtype == expected.dtype
