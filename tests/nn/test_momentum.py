"""`nn.MomentumEncoder`: the average in every dtype, its memory, buffers, schedule, and state."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from ssl_kernels.nn import MomentumEncoder, cosine_momentum
from tests.helpers import same_bits


def small_network(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    return network.to(dtype)


def moved(network, amount=1.0):
    """A copy of other weights."""
    network = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(amount)
    return network


def parameters(module):
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.996, 0.9999, 1.0])
def test_is_the_average_in_float64(dtype, momentum):
    network = small_network(dtype)
    encoder = MomentumEncoder(network, momentum)
    target = moved(network)
    exact = [parameter.double() for parameter in parameters(network)]
    for _ in range(50):
        encoder.update_(target)
        exact = [
            momentum * average + (1 - momentum) * parameter.detach().double()
            for average, parameter in zip(exact, target.parameters(), strict=True)
        ]
    for average, truth in zip(encoder.module.parameters(), exact, strict=True):
        assert average.dtype == dtype
        eps = torch.finfo(dtype).eps / 2
        wide = 1e-5 if dtype != torch.float64 else 1e-13
        torch.testing.assert_close(average.double(), truth, rtol=1.01 * eps, atol=wide)


@pytest.mark.parametrize("momentum", [0.996, 0.999, 0.9999])
def test_a_bfloat16_average_does_not_freeze(momentum):
    """An average in bfloat16 itself would never move: each step is lost in rounding."""
    network = small_network(torch.bfloat16)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(1.0)
    target = moved(network, 0.25)
    frozen = parameters(network)
    for _ in range(300):
        torch._foreach_lerp_(frozen, [p.detach() for p in target.parameters()], 1 - momentum)
    assert all((parameter == 1).all() for parameter in frozen)
    encoder = MomentumEncoder(network, momentum)
    for _ in range(300):
        encoder.update_(target)
    expected = 1 + 0.25 * (1 - momentum**300)
    for parameter in encoder.module.parameters():
        torch.testing.assert_close(
            parameter.float(), torch.full_like(parameter, expected, dtype=torch.float32), rtol=2**-8, atol=0
        )
        assert (parameter > 1).all() or momentum == 0.9999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_memory_is_never_replaced(dtype, buffers):
    network = small_network(dtype)
    encoder = MomentumEncoder(network, 0.9, buffers=buffers)
    where = {
        name: tensor.data_ptr() for name, tensor in encoder.state_dict().items() if torch.is_tensor(tensor)
    }
    objects = [id(tensor) for tensor in (*encoder.parameters(), *encoder.buffers())]
    for _ in range(3):
        encoder.update_(moved(network))
    state = encoder.state_dict()
    assert {name: state[name].data_ptr() for name in where} == where
    assert [id(tensor) for tensor in (*encoder.parameters(), *encoder.buffers())] == objects


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_buffers_are_copied_or_averaged(dtype):
    network = small_network(dtype)
    copied, averaged = (MomentumEncoder(network, 0.75, buffers=policy) for policy in ("copy", "average"))
    network[1].running_mean.fill_(8.0)
    network[1].num_batches_tracked.fill_(5)
    for encoder in (copied, averaged):
        encoder.update_(network)
        assert encoder.module[1].num_batches_tracked.item() == 5
    assert (copied.module[1].running_mean == 8).all()
    assert (averaged.module[1].running_mean == 2).all()


def test_neither_is_coupled_to_the_other():
    network = small_network()
    encoder = MomentumEncoder(network, 0.5)
    before = parameters(network)
    encoder.update_(moved(network))
    assert all(same_bits(a, b) for a, b in zip(parameters(network), before, strict=True))
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images = torch.randn(5, 4, requires_grad=True)
    assert not encoder(images).requires_grad


def test_mode_follows_train_and_eval():
    encoder = MomentumEncoder(small_network().eval())
    assert not encoder.module.training
    assert encoder.train().module.training


def test_cosine_schedule_rises_from_base_to_one():
    values = [cosine_momentum(step, 100, 0.99) for step in range(121)]
    assert values[0] == pytest.approx(0.99)
    assert values[50] == pytest.approx(0.995)
    assert values[100:] == [1.0] * 21
    assert values[:101] == sorted(values[:101])
    encoder = MomentumEncoder(small_network(), 0.99, steps=100)
    found = []
    for _ in range(3):
        found.append(encoder.current_momentum)
        encoder.update_(small_network())
    assert found == values[:3]


def test_momentum_of_one_update():
    network = small_network()
    encoder = MomentumEncoder(network, 0.9)
    target = moved(network)
    encoder.update_(target, momentum=0.0)
    for average, parameter in zip(encoder.module.parameters(), target.parameters(), strict=True):
        torch.testing.assert_close(average, parameter, rtol=1e-6, atol=0, check_stride=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_reloaded_in_the_middle_it_ends_bit_for_bit_the_same(dtype):
    network = small_network(dtype)
    whole, broken = (MomentumEncoder(network, 0.99, steps=10, buffers="average") for _ in range(2))
    for step in range(6):
        if step == 3:
            file = io.BytesIO()
            torch.save(broken.state_dict(), file)
            file.seek(0)
            broken = MomentumEncoder(small_network(dtype, seed=9), 0.99, steps=10, buffers="average")
            broken.load_state_dict(torch.load(file, weights_only=True))
        for encoder in (whole, broken):
            encoder.update_(moved(network, 0.1 * step))
    first, second = whole.state_dict(), broken.state_dict()
    assert first.keys() == second.keys()
    assert all(same_bits(first[k], second[k]) for k in first if torch.is_tensor(first[k]))
    assert whole.updates == broken.updates == 6


def test_casting_keeps_the_float32_average():
    network = small_network()
    encoder = MomentumEncoder(network, 0.99)
    encoder.update_(moved(network))
    before = parameters(encoder.module)
    encoder.to(torch.bfloat16)
    masters = list(encoder.masters.buffers())
    assert all(same_bits(a, b) for a, b in zip(masters, before, strict=True))
    encoder.update_(moved(network))  # of float32 into a bfloat16 copy
    assert {p.dtype for p in encoder.module.parameters()} == {torch.bfloat16}
    exact = [master.clone() for master in encoder.masters.buffers()]
    encoder.to(torch.float16)
    encoder.update_(network, momentum=1.0)  # moves nothing
    assert len(list(encoder.masters.buffers())) == len(before)
    encoder.float()
    assert not list(encoder.masters.buffers())
    # In bfloat16 and float16 the last update would have been rounded.
    assert all(same_bits(a, b) for a, b in zip(encoder.module.parameters(), exact, strict=True))
    assert not same_bits(exact[0], exact[0].half().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_written_from_outside_stay(dtype):
    encoder = MomentumEncoder(small_network(dtype))
    written = moved(encoder.module)
    encoder.module.load_state_dict(written.state_dict())
    encoder.update_(small_network(dtype), momentum=1.0)
    for average, parameter in zip(encoder.module.parameters(), written.parameters(), strict=True):
        assert same_bits(average, parameter)


@pytest.mark.parametrize("backend", ["native", "chunked", "reference"])
@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_backend_takes_sources_of_any_dtype_and_layout(backend, source):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 7)).to(torch.bfloat16)
    for layout in (torch.channels_last, torch.contiguous_format):
        encoder = MomentumEncoder(network.to(memory_format=layout), 0.75, backend=backend)
        target = moved(network).to(source).to(memory_format=torch.contiguous_format)
        expected = [
            (0.75 * old.double() + 0.25 * new.detach().double()).float()
            for old, new in zip(network.parameters(), target.parameters(), strict=True)
        ]
        encoder.update_(target)
        for average, master, truth in zip(
            encoder.module.parameters(), encoder.masters.buffers(), expected, strict=True
        ):
            torch.testing.assert_close(master, truth, rtol=3e-7, atol=1e-7, check_stride=False)
            assert torch.equal(average, master.to(torch.bfloat16))


def test_averages_that_are_parts_of_a_larger_tensor():
    network = nn.Linear(2, 3).to(torch.bfloat16)
    network.register_buffer("part", torch.ones(4, 6, dtype=torch.bfloat16)[:, ::2])
    encoder = MomentumEncoder(network, 0.5, buffers="average")
    network.part.fill_(2.0)
    encoder.update_(network)
    assert (encoder.module.part == 1.5).all()


def test_complex_parameters_are_averaged():
    class Wave(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.wave = nn.Parameter(torch.full((3,), value, dtype=torch.complex64))

    encoder = MomentumEncoder(Wave(1 + 2j))
    encoder.update_(Wave(3 - 2j), momentum=0.75)
    assert (encoder.module.wave == 1.5 + 1j).all()


def test_momentum_of_numpy():
    encoder = MomentumEncoder(nn.Linear(1, 1), np.float32(0.5))
    assert type(encoder.momentum) is float and encoder.momentum == 0.5


@pytest.mark.parametrize("change, error, message", [
    ({"module": 3}, TypeError, "module must be an nn.Module, got int"),
    ({"momentum": 1.5}, ValueError, r"momentum must be in \[0, 1\], got 1.5"),
    ({"momentum": float("nan")}, ValueError, r"momentum must be in \[0, 1\], got nan"),
    ({"momentum": "0.9"}, TypeError, "momentum must be a number, got str"),
    ({"steps": 0}, ValueError, "steps must be an integer >= 1 or None, got 0"),
    ({"buffers": "keep"}, ValueError, "buffers must be"),
])  # fmt: skip
def test_refuses_what_does_not_fit(change, error, message):
    with pytest.raises(error, match=f"^MomentumEncoder: {message}"):
        MomentumEncoder(**({"module": small_network()} | change))


def test_refuses_another_module():
    encoder = MomentumEncoder(small_network())
    with pytest.raises(ValueError, match=r"^MomentumEncoder: module must have the parameters and buffers"):
        encoder.update_(nn.Linear(4, 6))
    wider = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match=r"^MomentumEncoder: 0.weight of module must have shape \(6, 4\)"):
        encoder.update_(wider)
