"""torch.func over every public function: right in the reference, an error that names it on the other backends.
And batches of gradients, which reach a backward under vmap: right on every backend."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch.func import grad, vmap

import ssl_kernels
from ssl_kernels.ops.library import in_turn
from tests.helpers import OPERATORS, random_rows
from tests.losses.cases import CASES, OTHER_CASES


def mixing_calls():
    """(function, its floating tensor, the other arguments)."""
    images, permutation = random_rows(4, 24, torch.float64).view(4, 2, 3, 4), torch.tensor([2, 0, 1, 3])
    boxes = torch.tensor([[0, 2, 1, 3], [0, 0, 0, 0], [1, 3, 0, 4], [0, 1, 0, 1]])
    target = torch.tensor([0, 2, 1, 1])
    return {
        "mixup": (images, {"lam": 0.3, "permutation": permutation}),
        "cutmix": (images, {"boxes": boxes, "permutation": permutation}),
        "mixup_cross_entropy": (
            random_rows(4, 5, torch.float64),
            {"target": target, "permutation": permutation, "lam": 0.3},
        ),
    }


def calls():
    """name -> (function of a dictionary of floating tensors and a backend, the tensors)."""
    made = {}
    for case in CASES + OTHER_CASES:
        arguments = case.arguments(6, 4, requires_grad=False)
        leaves = case.leaves(arguments)

        def loss(leaves, backend, case=case, arguments=arguments, **options):
            return case.ours(backend, **options)(**arguments | leaves)

        made[case.name] = (loss, leaves)
    for name, (x, options) in mixing_calls().items():

        def mixed(leaves, backend, name=name, options=options, reduction="mean"):
            result = getattr(ssl_kernels, name)(leaves["x"], **options, backend=backend)
            return result if reduction == "none" else result.square().mean()

        made[name] = (mixed, {"x": x})
    return made


CALLS = calls()
every_call = pytest.mark.parametrize("name", CALLS)


def test_every_function_with_a_derivative_is_called():
    without = {
        "backends_for",
        "empty_cache",
        "nn",
        "use_backend",
        "mixup_",
        "cutmix_",
        "mixup_normalize",
        "matryoshka",
        "adapters",
        "grad_cache",
        "patch",
        "sinkhorn",
    }
    called = {case.loss for case in CASES + OTHER_CASES} | set(mixing_calls())
    assert called == {name for name in ssl_kernels.__all__ if name not in without}


def trained(leaves):
    return {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}


def gradients(call, leaves):
    leaves = trained(leaves)
    return torch.autograd.grad(call(leaves, "reference"), list(leaves.values()))


@every_call
def test_the_reference_is_right(name):
    call, leaves = CALLS[name]
    twice = {key: 0.8 * leaf for key, leaf in leaves.items()}
    expected = [gradients(call, leaves), gradients(call, twice)]
    found = grad(lambda leaves: call(leaves, "reference"))(leaves)
    for ours, truth in zip(found.values(), expected[0], strict=True):
        torch.testing.assert_close(ours, truth)
    both = {key: torch.stack((leaf, twice[key])) for key, leaf in leaves.items()}
    found = vmap(grad(lambda leaves: call(leaves, "reference")))(both)
    for ours, *truth in zip(found.values(), *expected, strict=True):
        torch.testing.assert_close(ours, torch.stack(truth))


@every_call
@pytest.mark.parametrize("backend", [*OPERATORS, None])
def test_other_backends_name_the_reference(name, backend):
    call, leaves = CALLS[name]
    both = {key: torch.stack((leaf, leaf)) for key, leaf in leaves.items()}
    for transform, operands in ((grad, leaves), (lambda f: vmap(grad(f)), both)):
        with pytest.raises(NotImplementedError, match=r'inside torch\.func; backend="reference" '):
            transform(lambda leaves: call(leaves, backend))(operands)


@every_call
@pytest.mark.parametrize("backend", ["reference", *OPERATORS])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradients_may_come_as_a_batch(name, backend, reduction):
    """As from jacobian(vectorize=True), and from methods that combine the gradients of several tasks."""
    call, leaves = CALLS[name]
    leaves = trained(leaves)
    loss, operands = call(leaves, backend, reduction=reduction), list(leaves.values())
    grads = torch.randn(3, *loss.shape, dtype=loss.dtype, generator=torch.Generator().manual_seed(1))
    expected = [torch.autograd.grad(loss, operands, each, retain_graph=True) for each in grads]
    found = torch.autograd.grad(loss, operands, grads, is_grads_batched=True)
    for ours, *truth in zip(found, *expected, strict=True):
        torch.testing.assert_close(ours, torch.stack(truth))


@pytest.mark.parametrize("name", ["nt_xent", "sup_con", "clip", "siglip", "byol", "swav", "vicreg", "mae"])
@pytest.mark.parametrize("backend", OPERATORS)
def test_a_batch_of_gradients_is_not_differentiated_again(name, backend):
    call, leaves = CALLS[name]
    leaves = trained(leaves)
    loss, operands = call(leaves, backend), list(leaves.values())
    slope = torch.autograd.grad(loss, operands[0], create_graph=True)[0]
    found = torch.autograd.grad(
        loss, operands[0], torch.ones(2, dtype=loss.dtype), is_grads_batched=True, create_graph=True
    )[0]
    torch.testing.assert_close(found, torch.stack((slope, slope)))
    with pytest.raises(
        RuntimeError, match=f'"{backend}" has no second derivative; backend="reference" has one'
    ):
        torch.autograd.grad(found.square().sum(), operands[0])


def test_a_batch_is_known_in_a_thread_of_its_own():
    """In which the backward of a GPU runs."""

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(
                    in_turn, lambda grad: (torch.from_numpy(2 * grad.numpy()),), grad
                ).result()[0]

    x = torch.ones(3, requires_grad=True)
    (found,) = torch.autograd.grad(Doubled.apply(x), x, torch.eye(3), is_grads_batched=True)
    torch.testing.assert_close(found, 2 * torch.eye(3))


@pytest.mark.parametrize("backend", OPERATORS)
def test_a_batch_of_no_gradients_is_refused(backend):
    call, leaves = CALLS["nt_xent"]
    leaves = trained(leaves)
    loss, operands = call(leaves, backend), list(leaves.values())
    with pytest.raises(RuntimeError, match="a batch of gradients must hold at least one"):
        vmap(lambda grad: torch.autograd.grad(loss, operands, grad))(loss.new_empty(0))


@pytest.mark.parametrize("backend", ["reference", *OPERATORS])
@pytest.mark.parametrize("name", ["nt_xent", "swav", "vicreg"])
def test_batches_of_gradients_may_be_nested(name, backend):
    call, leaves = CALLS[name]
    leaves = trained(leaves)
    loss, operands = call(leaves, backend, reduction="none"), list(leaves.values())

    def slope(grad):
        return torch.autograd.grad(loss, operands[0], grad, retain_graph=True)[0]

    grads = torch.randn(2, 3, *loss.shape, dtype=loss.dtype, generator=torch.Generator().manual_seed(1))
    expected = torch.stack([torch.stack([slope(grad) for grad in row]) for row in grads])
    torch.testing.assert_close(vmap(vmap(slope))(grads), expected)
    torch.testing.assert_close(vmap(vmap(slope), in_dims=1, out_dims=1)(grads), expected)


def test_labels_may_be_mapped_over_too():
    features, labels = random_rows(18, 4, torch.float64).view(3, 6, 4), torch.arange(18).view(3, 6) % 4

    def loss(features, labels):
        return ssl_kernels.sup_con_loss(features, labels, backend="reference")

    found = vmap(grad(loss))(features, labels)
    for ours, rows, label in zip(found, features, labels, strict=True):
        torch.testing.assert_close(ours, grad(loss)(rows, label))


def test_the_share_of_imix_may_be_transformed_where_the_rows_are_not():
    """λ meets the kernels' results in operators alone, so every transform of it is right on every backend."""
    query, key = random_rows(6, 8, torch.float32, seed=1), random_rows(6, 8, torch.float32, seed=2)
    permutation = torch.tensor([1, 0, 3, 2, 5, 4])
    lam = torch.linspace(0.1, 0.9, 6, dtype=torch.float64)

    def loss(lam, backend=None):
        return ssl_kernels.imix_loss(query, key, permutation, lam, reduction="sum", backend=backend)

    slope = torch.func.grad(lambda lam: loss(lam, "reference").double())(lam)
    torch.testing.assert_close(torch.func.grad(loss)(lam), slope, rtol=1e-4, atol=1e-5)
    value, tangent = torch.func.jvp(loss, (lam,), (torch.ones_like(lam),))
    torch.testing.assert_close(value, loss(lam))
    torch.testing.assert_close(tangent.double(), slope.sum(), rtol=1e-4, atol=1e-4)
    mapped = torch.func.vmap(loss)(torch.stack((lam, 1 - lam)))
    torch.testing.assert_close(mapped, torch.stack((loss(lam), loss(1 - lam))))
