"""Every loss through torch.export with a batch that may change, and under FakeTensorMode."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from ssl_kernels import losses, moco_loss
from tests.helpers import BACKENDS, random_rows
from tests.losses.cases import CASES, OTHER_CASES, on_backends

ALL = CASES + OTHER_CASES
ONE_A_LOSS = list({case.loss: case for case in ALL}.values())
others_are_slow = [case if case in ONE_A_LOSS else pytest.param(case, marks=pytest.mark.slow) for case in ALL]


def test_every_loss_is_here():
    assert {case.loss for case in ONE_A_LOSS} == set(losses.__all__)


class Head(torch.nn.Module):
    """A loss of tensors by position, the first through a layer that is learned."""

    def __init__(self, function, width):
        super().__init__()
        self.function = function
        self.layer = torch.nn.Linear(width, width)

    def forward(self, first, *others):
        return self.function(self.layer(first), *others)


def exported(function, tensors, others):
    """The exported program, sizes free of the first dimensions that are other ones in a batch of `others`."""
    head = Head(function, tensors[0].shape[1])
    free = tuple(
        {0: torch.export.Dim.DYNAMIC} if tensor.dim() and len(tensor) != len(other) else None
        for tensor, other in zip(tensors, others, strict=True)
    )
    dynamic = (free[0], free[1:]) if len(free) > 1 else free
    return head, torch.export.export(head, tensors, dynamic_shapes=dynamic, strict=False).module()


def same_at(sizes_of_tensors, head, program):
    for tensors in sizes_of_tensors:
        torch.testing.assert_close(program(*tensors), head(*tensors))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", others_are_slow, ids=str)
@pytest.mark.parametrize("scalar", ["number", "tensor"])
def test_exported_losses_take_other_batches(case, scalar):
    """A constant may be in the program, but no size of the batch that it was exported with."""
    sizes = [case.arguments(n, 5, torch.float32, seed=n, requires_grad=False) for n in (6, 9, 4)]
    constants = {name: value for name, value in sizes[0].items() if not isinstance(value, torch.Tensor)}
    if scalar == "number" and case.scalar:
        constants[case.scalar] = sizes[0][case.scalar].item()
    names = [name for name in sizes[0] if name not in constants]

    def loss(*tensors):
        return case.ours()(**dict(zip(names, tensors, strict=True)), **constants)

    sizes = [tuple(arguments[name] for name in names) for arguments in sizes]
    same_at(sizes, *exported(loss, *sizes[:2]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_on_the_other_backends(backend):
    sizes = [(random_rows(n, 5), torch.arange(n) % 3) for n in (6, 9, 4)]

    def loss(features, labels):
        each = losses.sup_con_loss(features, labels, reduction="none", backend=backend)
        return each + losses.triplet_loss(features, labels, backend=backend)

    same_at(sizes, *exported(loss, *sizes[:2]))


@pytest.mark.filterwarnings("ignore")
def test_moco_of_two_views_in_the_batch():
    sizes = [(random_rows(n, 5), random_rows(n, 5, seed=1)) for n in (6, 10, 4)]
    same_at(sizes, *exported(lambda query, key: moco_loss(query, key, symmetric=True), *sizes[:2]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case, backend", on_backends(ALL, BACKENDS), ids=str)
def test_fake_tensors_on_the_cpu(case, backend):
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        arguments = case.arguments(9, 5, torch.float32)
        loss = case.ours(backend)(**arguments)
        assert loss.shape == () and loss.fake_mode is mode
        leaves = case.leaves(arguments)
        for name, grad in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            assert grad.shape == leaves[name].shape and grad.dtype == leaves[name].dtype
