"""What the loss modules hold: numbers, buffers, parameters."""

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch

import ssl_kernels
from ssl_kernels import nn, nt_xent_loss, siglip_loss
from ssl_kernels.losses._module import Loss
from tests.helpers import random_rows, same_bits

VIEWS = random_rows(6, 4), random_rows(6, 4, seed=1)


def test_a_tensor_moves_with_its_module_and_is_saved():
    module = torch.nn.Sequential(nn.NTXentLoss(torch.tensor(0.3)), nn.SigLIPLoss(torch.ones(1), -5.0))
    assert set(module.state_dict()) == {"0.temperature", "1.logit_scale"}
    assert not list(module.parameters())
    assert module.to(torch.float64)[0].temperature.dtype == torch.float64
    assert module.to("meta")[1].logit_scale.is_meta
    module = module.to_empty(device="cpu")
    module.load_state_dict({"0.temperature": torch.tensor(0.2), "1.logit_scale": torch.tensor([7.0])})
    assert same_bits(module[0](*VIEWS), nt_xent_loss(*VIEWS, torch.tensor(0.2, dtype=torch.float64)))
    assert module[1].logit_scale.item() == 7


def test_a_checkpoint_without_it_loads_and_leaves_it():
    module = nn.NTXentLoss(torch.tensor(0.3))
    state = {}
    assert str(module.load_state_dict(state)) == "<All keys matched successfully>" and not state
    assert module.temperature == torch.tensor(0.3)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict({"margin": torch.tensor(0.1)})
    with pytest.raises(RuntimeError, match="Missing key"):  # what is learned must be there
        nn.NTXentLoss(torch.nn.Parameter(torch.tensor(0.3))).load_state_dict({})


def test_an_option_may_become_another_kind():
    module = nn.NTXentLoss(0.5)
    for value, held in (
        (torch.tensor(0.2), {"temperature"}),
        (0.3, set()),
        (torch.tensor(0.4), {"temperature"}),
        (torch.tensor([0.25]), {"temperature"}),
        (torch.nn.Parameter(torch.tensor(0.6)), {"temperature"}),
    ):
        module.temperature = value
        assert set(module.state_dict()) == held
        assert same_bits(module(*VIEWS), nt_xent_loss(*VIEWS, value))
        again = pickle.loads(pickle.dumps(module))
        assert repr(again) == repr(copy.deepcopy(module)) == repr(module)
    assert list(module.parameters()) and not list(module.buffers())


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_what_is_learned_has_a_dimension_and_loads_from_any_shape_of_one_element(shape):
    scale = torch.nn.Parameter(torch.tensor(5.0))
    module = nn.SigLIPLoss(scale, torch.tensor(-3.0))
    assert module.logit_scale is scale and scale.shape == (1,)
    module.load_state_dict({"logit_scale": torch.full(shape, 7.0), "logit_bias": torch.full(shape, -4.0)})
    assert same_bits(module(*VIEWS), siglip_loss(*VIEWS, 7.0, -4.0))
    module(*VIEWS).backward()
    assert scale.grad.shape == (1,)
    with pytest.raises(RuntimeError, match="size mismatch"):
        module.load_state_dict({"logit_scale": torch.ones(2), "logit_bias": torch.ones(2)})


def test_integers_and_numbers_of_numpy_are_taken():
    queue = nn.MoCoQueue(np.int64(8), np.int32(4))
    assert queue.storage.shape == (8, 4)
    layer = torch.nn.Linear(4, 4)
    average = nn.MomentumEncoder(layer, np.float32(0.5), steps=np.int64(10)).update_(layer)
    assert type(average.steps) is int
    images, target = torch.zeros(4, 1, 3, 3), torch.arange(4)
    mixed, dense = nn.Mixup(np.float32(0.5), num_classes=np.int64(4), generator=np.int64(1))(images, target)
    assert mixed.shape == images.shape and dense.shape == (4, 4)
    with pytest.raises(TypeError, match="size must be an int, got float64"):
        nn.MoCoQueue(np.float64(8), 4)


def test_gradients_reach_a_tensor_that_is_no_parameter():
    temperature = torch.tensor(0.3, requires_grad=True)
    nn.NTXentLoss(temperature)(*VIEWS).backward()
    assert temperature.grad.abs() > 0


def test_a_tensor_in_a_functional_call():
    module = nn.NTXentLoss(torch.tensor(0.3))
    found = torch.func.functional_call(module, {"temperature": torch.tensor(0.2)}, VIEWS)
    assert same_bits(found, nt_xent_loss(*VIEWS, torch.tensor(0.2)))
    assert module.temperature == torch.tensor(0.3)


LOSSES = [module for module in vars(nn).values() if isinstance(module, type) and issubclass(module, Loss)]


WEIGHTED = [module for module in LOSSES if "row_weights" in inspect.signature(module.forward).parameters]


@pytest.mark.parametrize("module", WEIGHTED, ids=lambda module: module.__name__)
def test_weights_of_rows_are_named(module):
    weights = inspect.signature(module.forward).parameters["row_weights"]
    assert weights.kind is inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize("module, function, own, given", [
    (nn.CLIPLoss, ssl_kernels.clip_loss, (9.0,), (4.0,)),
    (nn.SigLIPLoss, ssl_kernels.siglip_loss, (9.0, -3.0), (4.0, -1.0)),
])  # fmt: skip
def test_scale_and_bias_are_the_modules_own_or_given_at_the_call(module, function, own, given):
    x, y = torch.randn(2, 6, 8)
    leaves = [torch.nn.Parameter(torch.tensor([value])) for value in own]
    loss = module(*leaves)
    assert torch.equal(loss(x, y), function(x, y, *leaves))
    assert torch.equal(loss(x, y, *given), function(x, y, *given))
    assert torch.equal(module()(x, y, logit_scale=given[0]), module(given[0])(x, y))
    loss(x, y).backward()
    assert all(leaf.grad.item() != 0 for leaf in leaves)
    assert len(list(loss.parameters())) == len(loss.state_dict()) == len(own)


def test_a_clip_loss_without_options_has_no_state():
    """As the checkpoints have it from before the scale was an option."""
    nn.CLIPLoss().load_state_dict({})
