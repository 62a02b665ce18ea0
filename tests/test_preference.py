"""The table that says whether CUDA or Triton kernels go first on a GPU."""

import pytest
import torch

import ssl_kernels
from ssl_kernels import backends, preference


@pytest.mark.parametrize(
    "architecture, dtype, n, d, backend",
    [
        (80, torch.bfloat16, 8192, 128, "native"),
        (89, torch.float16, 8192, 128, "native"),
        (90, torch.bfloat16, 8192, 128, "triton"),
        (90, torch.bfloat16, 2047, 128, "native"),
        (90, torch.bfloat16, 2048, 257, "native"),
        (90, torch.bfloat16, 2048, 63, "native"),
        (100, torch.float16, 2048, 256, "triton"),
        (90, torch.float32, 8192, 128, "native"),
        (100, torch.float64, 8192, 128, "native"),
    ],
)
def test_the_entry_that_fits(architecture, dtype, n, d, backend):
    entry = preference.prefer(preference.CONTRASTIVE, torch.empty(n, d, dtype=dtype), architecture)
    assert entry.backend == backend and len(entry.reason) > 40


def test_every_entry_is_reached_by_some_call():
    reached = {
        preference.prefer(preference.CONTRASTIVE, torch.empty(n, 128, dtype=dtype), architecture)
        for n in (64, 4096)
        for dtype in (*preference.HALF, *preference.WIDE)
        for architecture in (80, 90, 100)
    }
    assert reached == set(preference.CONTRASTIVE)


def test_order_on_a_gpu_follows_the_table(monkeypatch):
    class OnGPU:
        is_cuda, device, dtype, shape = True, torch.device("cuda", 0), torch.bfloat16, (4096, 128)

    monkeypatch.setattr(backends, "architecture_of", lambda device: 90)
    monkeypatch.setitem(backends._operations, "contrastive", lambda backend, *_: None)
    assert backends.choose_backend("contrastive", None, "test", OnGPU) == "triton"
    assert backends.preferred("contrastive", OnGPU) == (
        preference.CONTRASTIVE[1].backend,
        preference.CONTRASTIVE[1].reason,
    )
    monkeypatch.setitem(
        backends._operations, "contrastive", lambda backend, *_: "no" if backend == "triton" else None
    )
    assert backends.choose_backend("contrastive", None, "test", OnGPU) == "native"


def test_on_the_cpu_the_order_is_that_of_the_backends():
    assert list(backends.backends_for("contrastive", torch.zeros(4, 8))) == list(backends.BACKENDS)


@pytest.mark.parametrize("loss", ["nt_xent_loss", "dcl_loss", "debiased_nt_xent_loss"])
def test_losses_of_two_views_are_judged_on_the_rows_they_run(loss, monkeypatch):
    loss = getattr(ssl_kernels, loss)

    class OnGPU:
        is_cuda, device, dtype, shape = True, torch.device("cuda", 0), torch.bfloat16, (1024, 128)

    monkeypatch.setattr(backends, "architecture_of", lambda device: 90)
    monkeypatch.setitem(backends._operations, "contrastive", lambda backend, *_: None)
    assert backends.choose_backend("contrastive", None, "test", OnGPU) == "native"
    assert backends.choose_backend("contrastive", None, "test", OnGPU, views=loss.views) == "triton"
