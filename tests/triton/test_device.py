"""Every operator in Triton launches its kernels on the device of its tensors, whichever is the current one."""

import contextlib

import pytest
import torch
from triton.runtime.jit import JITFunction

import ssl_kernels  # noqa: F401  defines the operators
from ssl_kernels.ops.operation import in_triton

N, D = 6, 16


def arguments_of(name, device):
    generator = torch.Generator().manual_seed(0)

    def rows(*shape, dtype=torch.float32):
        return torch.rand(shape, generator=generator).to(device, dtype)

    x, y, n, m = rows(N, D), rows(N, D), rows(N).double(), rows(N).double()
    order = torch.arange(N, device=device).roll(1)
    lam, scale, bias = rows(N), rows(), rows()
    image, boxes = rows(N, 3, 4, 4), torch.tensor([[1, 3, 0, 2]], device=device).expand(N, 4).contiguous()
    flags = (True, True, False, False)
    none = torch.empty(0, device=device)
    operands = (x, y, scale, None, None, None)
    return {
        "contrastive_fwd": (*operands, *flags, False, True),
        # Without a gradient of lse: the first tensor is not the first argument.
        "contrastive_bwd": (None, None, None, *operands, n, m, lam, lam, none, *flags, True, True),
        "sigmoid_pairs_fwd": (x, y, scale, bias, 0, True, True, False, False, True, True),
        "sigmoid_pairs_bwd": (n, x, y, scale, bias, 0, True, True, True, True),
        "batch_hard": (x, order // 2, True, "euclidean"),
        "row_pairs_fwd": (x, y, None, True, "product"),
        "row_pairs_bwd": (n, x, y, None, rows(N, 1, 4), True, "product", True, True, False),
        "queue_push_": (
            x, y, *(torch.zeros((), dtype=torch.int64, device=device) for _ in range(2)), True,
        ),
        "momentum_update_": ([x], [y.bfloat16()], [y], torch.tensor(0.1, device=device)),
        "mixup_": (image, lam, order),
        "mixup_fwd": (image, lam, order),
        "mixup_bwd": (image, image.clone(), lam, order, True),
        "cutmix_": (image, boxes, order),
        "cutmix_fwd": (image, boxes, order),
        "cutmix_bwd": (image, boxes, order),
        "mixup_normalize": (image, lam, order, rows(3), rows(3), torch.float32),
        "mixup_cross_entropy_fwd": (x, order, order, lam, None, 0.1, -100, False, "mean"),
        "mixup_cross_entropy_bwd": (n, x, order, order, lam, None, n, 0.1, -100, False),
    }[name]  # fmt: skip


def test_every_operator_in_triton_is_listed():
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CUDA")
    ours = {name for name in registered if name.startswith("ssl_kernels::") and name.endswith(".triton")}
    assert ours == {f"ssl_kernels::{name}.triton" for name in in_triton}
    assert "ssl_kernels::mixup_.triton" in ours


@pytest.mark.parametrize("name", in_triton)
def test_launches_on_the_device_of_its_tensors(name, gpu, monkeypatch):
    arguments = arguments_of(name, gpu.device)
    tensors = [
        x for y in arguments for x in (y if isinstance(y, list) else [y]) if isinstance(x, torch.Tensor)
    ]
    current, launched_on = [None], []

    @contextlib.contextmanager
    def device_of(tensor):
        assert any(tensor is each for each in tensors)
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(JITFunction, "run", lambda *_, **__: launched_on.append(current[-1]))
    with gpu.triton():
        in_triton[name](*arguments)
    assert launched_on and None not in launched_on
    assert current == [None]
