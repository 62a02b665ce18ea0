"""Every operator in Triton launches its kernels on the device of its tensors, whichever is the current one."""

import contextlib

import pytest
import torch
from triton.runtime.jit import JITFunction

from ssl_kernels.ops.operation import in_triton
from tests.layouts import calls_of


def arguments_of(name, device):
    """Arguments of calls of an operator."""

    def chunked(operator, *arguments):
        return getattr(torch.ops.ssl_kernels, operator).chunked(*arguments)

    for call in calls_of(name, torch.float32, device, chunked):
        yield list(call.values())
        if "grad_lse" in call:  # without it the first tensor is not the first argument
            yield list((call | {"grad_lse": None}).values())


def test_every_operator_in_triton_is_listed():
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    ours = {name for name in registered if name.startswith("ssl_kernels::") and name.endswith(".triton")}
    assert ours == {f"ssl_kernels::{name}.triton" for name in in_triton}
    assert "ssl_kernels::mixup_.triton" in ours


@pytest.mark.parametrize("name", in_triton)
def test_launches_on_the_device_of_its_tensors(name, gpu, monkeypatch):
    calls = list(arguments_of(name, gpu.device))
    current, launched_on = [None], []

    @contextlib.contextmanager
    def device_of(tensor):
        assert any(tensor is each for each in tensors)
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: launched_on.append(current[-1]))
    assert calls
    for arguments in calls:
        tensors = [
            x for y in arguments for x in (y if isinstance(y, list) else [y]) if isinstance(x, torch.Tensor)
        ]
        with gpu.triton():
            in_triton[name](*arguments)
        assert launched_on and None not in launched_on
        assert current == [None]
        launched_on.clear()
