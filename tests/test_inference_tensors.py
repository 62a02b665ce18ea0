"""What was made under torch.inference_mode, as a teacher's features are, beside what is learned."""

import inspect

import pytest
import torch

import ssl_kernels
from tests.helpers import BACKENDS, random_rows, same_bits
from tests.losses.cases import CASES, OTHER_CASES, on_backends

WITH_WEIGHTS = [
    case
    for case in CASES + OTHER_CASES
    if "row_weights" in inspect.signature(getattr(ssl_kernels, case.loss)).parameters
]
every_case_and_backend = pytest.mark.parametrize(
    "case, backend", on_backends(CASES + OTHER_CASES, BACKENDS), ids=str
)


def in_inference_mode(value):
    if not isinstance(value, torch.Tensor):
        return value
    with torch.inference_mode():
        made = value.clone()
    assert made.is_inference()
    return made


def gradient(run, x):
    x = x.detach().clone().requires_grad_()
    result = run(x)
    result.sum().backward()
    return x.grad


def same_gradient(run, x, others):
    expected = gradient(lambda x: run(x, **others), x)
    made = {name: in_inference_mode(value) for name, value in others.items()}
    found = gradient(lambda x: run(x, **made), x)
    assert same_bits(found, expected)
    return made


@every_case_and_backend
@pytest.mark.parametrize("normalize", [True, False])
def test_losses(case, backend, normalize):
    """For each tensor that is learned, everything else from inference mode; its gradient by bits."""
    takes = inspect.signature(getattr(ssl_kernels, case.loss)).parameters
    options = {} if "normalize" in dict(case.options) else {"normalize": normalize}
    if "normalize" not in takes:
        options = {}
    arguments = case.arguments(12, 6, torch.float32, requires_grad=False)
    for learned in case.leaves(arguments):
        others = {name: value for name, value in arguments.items() if name != learned}

        def run(leaf, /, learned=learned, **others):
            return case.ours(backend, **options)(**others | {learned: leaf})

        made = same_gradient(run, arguments[learned], others)
        with torch.no_grad():
            case.ours(backend, **options)(**made | {learned: arguments[learned]})
    with torch.inference_mode():
        case.ours(backend, **options)(**arguments)


@pytest.mark.parametrize("case, backend", on_backends(WITH_WEIGHTS, BACKENDS), ids=str)
def test_row_weights(case, backend):
    arguments = case.arguments(12, 6, torch.float64, requires_grad=False)
    rows = len(case.ours(backend, reduction="none")(**arguments))
    weights = {"row_weights": random_rows(rows, 1, torch.float64)[:, 0].abs()}
    learned = next(iter(case.leaves(arguments)))
    same_gradient(
        lambda x, **weights: case.ours(backend)(**arguments | {learned: x} | weights),
        arguments[learned],
        weights,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_moco_queue(backend):
    query, key, keys = (random_rows(8, 4, seed=seed) for seed in range(3))
    queue = ssl_kernels.nn.MoCoQueue(16, 4)
    queue.push_(in_inference_mode(keys))
    same_gradient(
        lambda query, key: ssl_kernels.moco_loss(query, key, queue, backend=backend), query, {"key": key}
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixing(backend):
    images, permutation = random_rows(4, 24).view(4, 2, 3, 4), torch.tensor([2, 0, 1, 3])
    lam, target = torch.tensor([0.3, 0.9, 1.0, 0.0]), torch.tensor([0, 2, 1, 1])
    boxes = torch.tensor([[0, 2, 1, 3], [0, 0, 0, 0], [1, 3, 0, 4], [0, 1, 0, 1]])

    def run(name):
        return lambda x, **others: getattr(ssl_kernels, name)(x, **others, backend=backend)

    same_gradient(run("mixup"), images, {"lam": lam, "permutation": permutation})
    same_gradient(run("cutmix"), images, {"boxes": boxes, "permutation": permutation})
    others = {"target": target, "permutation": permutation, "lam": lam}
    same_gradient(run("mixup_cross_entropy"), random_rows(4, 5), others)

    def by_lam(name, **more):
        return lambda lam, x: getattr(ssl_kernels, name)(x, lam=lam, backend=backend, **more)

    same_gradient(by_lam("mixup", permutation=permutation), lam, {"x": images})
    more = {"target": target, "permutation": permutation}
    same_gradient(by_lam("mixup_cross_entropy", **more), lam, {"x": random_rows(4, 5)})
