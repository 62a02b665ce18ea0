"""nn.NTXentLoss, and what autograd does with the node of nt_xent_loss."""

import copy
import pickle
import re
import weakref

import pytest
import torch
from torch import nn

import ssl_kernels
from ssl_kernels import nt_xent_loss
from tests.helpers import BACKENDS, same_bits
from tests.losses.test_nt_xent import views

# The module


def test_module_is_the_function():
    z0, z1 = views(20, 8)
    for options in ({}, {"normalize": False}, {"reduction": "none"}, {"backend": "chunked"}):
        module = ssl_kernels.nn.NTXentLoss(0.2, **options)
        assert same_bits(module(z0, z1), nt_xent_loss(z0, z1, 0.2, **options))
    assert ssl_kernels.nn.NTXentLoss().temperature == 0.5


def test_module_with_a_parameter_learns_and_is_saved():
    loss = ssl_kernels.nn.NTXentLoss(nn.Parameter(torch.tensor(0.3)))
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    assert list(loss.state_dict()) == ["temperature"]
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
    before = loss(*views(20, 8)).item()
    for _ in range(3):
        optimizer.zero_grad()
        loss(*views(20, 8)).backward()
        optimizer.step()
    assert loss(*views(20, 8)).item() < before

    restored = ssl_kernels.nn.NTXentLoss(nn.Parameter(torch.tensor(1.0)))
    restored.load_state_dict(loss.state_dict())
    assert same_bits(restored(*views(20, 8)), loss(*views(20, 8)))
    assert list(ssl_kernels.nn.NTXentLoss(0.3).state_dict()) == []


@pytest.mark.parametrize("temperature", [0.3, nn.Parameter(torch.tensor(0.3))], ids=["float", "parameter"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_module_can_be_copied_and_pickled(temperature, duplicate):
    loss = ssl_kernels.nn.NTXentLoss(temperature, normalize=False, reduction="sum", backend="reference")
    again = duplicate(loss)
    assert same_bits(again(*views(6, 4)), loss(*views(6, 4)))
    if isinstance(temperature, nn.Parameter):
        assert again.temperature is not loss.temperature


def test_module_describes_itself():
    text = repr(ssl_kernels.nn.NTXentLoss(0.25, reduction="sum"))
    assert re.search(r"NTXentLoss\(temperature=0\.25, .*reduction='sum'", text)


@pytest.mark.parametrize("loss", ["nt_xent_loss", "clip_loss", "siglip_loss"])
def test_forward_mode_is_refused_by_a_kernel_and_right_in_the_reference(loss):
    scalars = {"nt_xent_loss": (0.5,), "clip_loss": (2.0,), "siglip_loss": (2.0, -1.0)}[loss]
    function = getattr(ssl_kernels, loss)
    z0, z1 = views(5, 8, torch.float64)
    tangent = torch.randn(z0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(z0, tangent)
        with pytest.raises(NotImplementedError, match="forward-mode"):
            function(dual, z1, *scalars, backend="native")
        value = function(dual, z1, *scalars, backend="reference")
        found = torch.autograd.forward_ad.unpack_dual(value).tangent
    leaf = z0.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf, z1, *scalars, backend="reference"), leaf)
    torch.testing.assert_close(found, (grad * tangent).sum())


@pytest.mark.parametrize("backend", BACKENDS)
def test_incoming_gradient_is_left_alone(backend):
    z0, z1 = (z.requires_grad_() for z in views(6, 8, torch.float64))
    loss = nt_xent_loss(z0, z1, backend=backend)
    incoming = torch.tensor(3.0, dtype=torch.float64)
    (first,) = torch.autograd.grad(loss, z0, incoming, retain_graph=True)
    assert incoming.item() == 3
    (second,) = torch.autograd.grad(loss, z0, incoming)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    (both,) = torch.autograd.grad(
        nt_xent_loss(z0, z1, backend=backend) + nt_xent_loss(z0, z1, backend=backend), z0
    )
    torch.testing.assert_close(both * 1.5, first)


def test_backward_releases_what_it_saved():
    hidden = torch.randn(8, 16, requires_grad=True) * 1
    loss = nt_xent_loss(hidden, torch.randn(8, 16), backend="native")
    loss.backward()
    alive = weakref.ref(hidden)
    del hidden
    assert alive() is None
