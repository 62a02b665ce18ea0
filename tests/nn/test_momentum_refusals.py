"""What `nn.MomentumEncoder` refuses: an update that raises changes nothing."""

import copy

import pytest
import torch
from torch import nn

from ssl_kernels.nn import MomentumEncoder
from tests.helpers import same_bits
from tests.nn.test_momentum import moved, small_network
from tests.nn.test_momentum_setups import same_state, updated


def another_parameter(network):
    network.extra = nn.Linear(1, 1)


def another_shape(network):
    network[3].bias = nn.Parameter(torch.zeros(4))


def complex_weights(network):
    network[3].bias = nn.Parameter(torch.zeros(3, dtype=torch.complex64))


def grown_buffer_and_complex_weights(network):
    network[1].running_var = torch.ones(9)
    complex_weights(network)


def sparse_weights(network):
    network[3].bias = nn.Parameter(torch.zeros(3).to_sparse())


def on_meta(network):
    network[3].bias = nn.Parameter(torch.zeros(3, device="meta"))


def buffer_on_meta(network):
    network[1].running_var = torch.ones(6, device="meta")


def buffer_of_a_part_that_is_not_there(network):
    network[0].extra = nn.Module()
    network[0].extra.register_buffer("late", torch.zeros(2))


def averages_of_a_byte(encoder):
    encoder.module[3].bias = nn.Parameter(torch.zeros(3).to(torch.float8_e4m3fn), requires_grad=False)


def averages_that_overlap(encoder):
    encoder.module[3].bias = nn.Parameter(torch.zeros(1).expand(3), requires_grad=False)


def averages_of_inference_mode(encoder):
    with torch.inference_mode():
        encoder.module[3].bias = nn.Parameter(torch.zeros(3), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("source, average, options, message", [
    (another_parameter, None, {}, r"module must have the parameters and buffers of the copy, got none named \[\]"),
    (another_shape, None, {}, r"3.bias of module must have shape \(3,\), got \(4,\)"),
    (complex_weights, None, {}, "3.bias of module must be real as that of the copy, got complex64"),
    (grown_buffer_and_complex_weights, None, {}, "3.bias of module must be real as that of the copy, got complex64"),
    (sparse_weights, None, {}, "3.bias of module must be torch.strided on cpu as that of the copy, got torch.sp"),
    (on_meta, None, {}, "3.bias of module must be torch.strided on cpu as that of the copy, got torch.strided on meta"),
    (buffer_on_meta, None, {}, "1.running_var of module must be torch.strided on cpu as that of the copy"),
    (buffer_of_a_part_that_is_not_there, None, {}, "module must have the parts of the copy, got a surplus 0.extra"),
    (None, averages_of_a_byte, {}, "3.bias must be dense and of 16 to 128 bits to be averaged, got float8_e4m3fn"),
    (None, averages_that_overlap, {}, r"3.bias of the copy must hold each element once, got strides \(0,\)"),
    (None, averages_of_inference_mode, {}, "3.bias of the copy was made under torch.inference_mode"),
    (None, None, {"momentum": 1.5}, r"momentum must be in \[0, 1\], got 1.5"),
    (None, None, {"momentum": "0.5"}, "momentum must be a number, got str"),
])  # fmt: skip
def test_an_update_that_raises_changes_nothing(dtype, source, average, options, message):
    network = small_network(dtype)
    encoder = updated(dtype, buffers="average")
    target = moved(network)
    if average is not None:
        average(encoder)
    if source is not None:
        source(target)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises((TypeError, ValueError), match=f"^MomentumEncoder: {message}"):
        encoder.update_(target, **options)
    after = encoder.state_dict()
    assert after.keys() == before.keys()
    assert all(same_bits(after[name].contiguous(), before[name].contiguous()) for name in before)
    assert encoder.updates == 3


def test_a_backend_that_cannot_run_moves_nothing():
    encoder = MomentumEncoder(
        nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.bfloat16)), backend="triton"
    )
    before = copy.deepcopy(encoder)
    with pytest.raises(ValueError, match='backend "triton" cannot run this call'):
        encoder.update_(moved(encoder.module))
    assert same_state(encoder, before)
    with pytest.raises(ValueError, match=r'^MomentumEncoder: backend must be "native"'):
        MomentumEncoder(nn.Linear(2, 2), backend="gpu")


def test_a_lazy_module_is_refused():
    with pytest.raises(ValueError, match=r"^MomentumEncoder: module must have been run once .* got weight"):
        MomentumEncoder(nn.LazyLinear(3))
