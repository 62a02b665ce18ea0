"""The table that says whether CUDA or Triton kernels go first on a GPU."""

from types import SimpleNamespace

import pytest
import torch

import ssl_kernels
from ssl_kernels import backends, preference
from ssl_kernels.ops import contrastive as contrastive_operation


@pytest.mark.parametrize(
    "architecture, dtype, n, d, backend",
    [
        (80, torch.bfloat16, 65536, 128, "native"),
        (89, torch.float16, 65536, 128, "native"),
        (90, torch.bfloat16, 16384, 128, "triton"),
        (90, torch.bfloat16, 16383, 128, "native"),
        (90, torch.bfloat16, 16384, 255, "triton"),
        (90, torch.bfloat16, 65536, 256, "native"),
        (90, torch.bfloat16, 16384, 63, "native"),
        (100, torch.float16, 16384, 200, "triton"),
        (103, torch.float16, 16384, 128, "triton"),
        (75, torch.float16, 65536, 128, "native"),
        (120, torch.bfloat16, 65536, 128, "native"),
        (90, torch.float32, 65536, 128, "native"),
        (80, torch.float64, 4096, 128, "triton"),
        (90, torch.float64, 4096, 512, "triton"),
        (90, torch.float64, 4095, 128, "native"),
        (86, torch.float64, 65536, 128, "native"),
        (88, torch.float64, 65536, 128, "native"),
        (100, torch.float64, 65536, 128, "native"),
    ],
)
def test_the_entry_that_fits(architecture, dtype, n, d, backend):
    entry = preference.prefer(preference.CONTRASTIVE, torch.empty(n, d, dtype=dtype), architecture)
    assert entry.backend == backend and len(entry.reason) > 40


def test_every_entry_is_reached_by_some_call():
    reached = {
        preference.prefer(preference.CONTRASTIVE, torch.empty(n, d, dtype=dtype), architecture)
        for n, d in ((64, 128), (16384, 128), (16384, 512))
        for dtype in (*preference.HALF, *preference.FLOAT32, *preference.FLOAT64)
        for architecture in (80, 90, 100)
    }
    assert reached == set(preference.CONTRASTIVE)


def test_order_on_a_gpu_follows_the_table(monkeypatch):
    class OnGPU:
        is_cuda, device, dtype, shape = True, torch.device("cuda", 0), torch.bfloat16, (16384, 128)

    monkeypatch.setattr(backends, "architecture_of", lambda device: 90)
    monkeypatch.setitem(backends._operations, "contrastive", lambda backend, *_: None)
    assert backends.choose_backend("contrastive", None, "test", OnGPU) == "triton"
    assert backends.preferred("contrastive", OnGPU) == (
        "triton",
        next(entry.reason for entry in preference.CONTRASTIVE if "wgmma (" in entry.reason),
    )
    monkeypatch.setitem(
        backends._operations, "contrastive", lambda backend, *_: "no" if backend == "triton" else None
    )
    assert backends.choose_backend("contrastive", None, "test", OnGPU) == "native"


@pytest.mark.parametrize(
    "built, runs, does_not",
    [
        ("8.0", (80, 86, 89), (75, 87, 88, 90, 100, 120)),
        ("8.6", (86, 89), (80, 87, 88)),
        ("8.7", (87, 89), (86, 88)),
        ("8.8", (88, 89), (86, 87)),
        ("9.0", (90,), (89, 100)),
        ("9.0a", (90,), (100,)),
        ("10.0", (100, 103), (90, 101, 110, 120)),
        ("10.0f", (100, 103), (120,)),
        ("8.0+PTX", (80, 87, 88, 89, 90, 110, 120), (72, 75)),
        ("9.0a+PTX", (90,), (100, 120)),
    ],
)
def test_where_built_code_runs(built, runs, does_not):
    assert all(backends.runs_on(built, architecture) for architecture in runs)
    assert not any(backends.runs_on(built, architecture) for architecture in does_not)


@pytest.mark.parametrize(
    "architecture, built, native, triton, chosen",
    [
        (75, "8.0+PTX 9.0 10.0", "built for compute capability 8.0+PTX, 9.0, 10.0, which does not run on 7.5",
         "need compute capability 8.0, this GPU has 7.5", "chunked"),
        (80, "8.0+PTX 9.0 10.0", None, None, "native"),
        (89, "8.0+PTX 9.0 10.0", None, None, "native"),
        (90, "8.0+PTX 9.0 10.0", None, None, "triton"),
        (120, "8.0+PTX 9.0 10.0", None, None, "native"),
        (120, "9.0 10.0", "built for compute capability 9.0, 10.0, which does not run on 12.0", None, "triton"),
        (80, "", "the extension was built without CUDA", None, "triton"),
    ],
)  # fmt: skip
def test_what_runs_on_which_card(architecture, built, native, triton, chosen, monkeypatch):
    """As a T4, A100, RTX 4090, H100 and RTX 5090 see it."""

    class Extension:
        build_info = staticmethod(lambda: {"cuda_architectures": built})

    rows = SimpleNamespace(
        is_cuda=True, device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(16384, 128)
    )
    monkeypatch.setattr(backends, "extension", Extension)
    monkeypatch.setattr(backends, "_architecture", lambda device: architecture)
    monkeypatch.setattr(backends, "architecture_of", lambda device: architecture)
    monkeypatch.setattr("ssl_kernels.triton.contrastive.unsupported", lambda *_: None)
    for backend, reason in (("native", native), ("triton", triton)):
        found = contrastive_operation.unsupported(backend, rows)
        assert found is None if reason is None else reason in found
    assert backends.choose_backend("contrastive", None, "test", rows) == chosen
    others = backends._operations["sigmoid_pairs"]
    if torch._C._dispatch_has_kernel_for_dispatch_key("ssl_kernels::sigmoid_pairs_fwd.native", "CUDA"):
        assert others("native", rows) == contrastive_operation.unsupported("native", rows)
    assert triton is None or triton in others("triton", rows)


def test_on_the_cpu_the_order_is_that_of_the_backends():
    assert list(backends.backends_for("contrastive", torch.zeros(4, 8))) == list(backends.BACKENDS)


@pytest.mark.parametrize("loss", ["nt_xent_loss", "dcl_loss", "debiased_nt_xent_loss"])
def test_losses_of_two_views_are_judged_on_the_rows_they_run(loss, monkeypatch):
    loss = getattr(ssl_kernels, loss)

    class OnGPU:
        is_cuda, device, dtype, shape = True, torch.device("cuda", 0), torch.bfloat16, (8192, 128)

    monkeypatch.setattr(backends, "architecture_of", lambda device: 90)
    monkeypatch.setitem(backends._operations, "contrastive", lambda backend, *_: None)
    assert backends.choose_backend("contrastive", None, "test", OnGPU) == "native"
    assert backends.choose_backend("contrastive", None, "test", OnGPU, views=loss.views) == "triton"
