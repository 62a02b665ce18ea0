"""`python -m ssl_kernels info`: what is built, for what, what can run and why the rest cannot."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ssl_kernels import __main__, backends, cli, constants, info


def report(capsys):
    assert cli.main(["info"]) == 0
    return capsys.readouterr().out


def test_what_is_built_and_what_can_run(capsys):
    text = report(capsys)
    built = backends.extension.build_info()
    assert f"torch {torch.__version__}" in text and built["compiler"] in text
    assert f"CPU kernels: {built['cpu_instruction_set']}" in text
    assert f"CUDA kernels: {built['cuda_architectures'] or 'none'}; float32 products exact" in text
    for operation in backends.operations():
        (part,) = (part for part in text.split("\n\n") if part.startswith(f"{operation} on cpu"))
        lines = dict(line.split(maxsplit=1) for line in part.splitlines()[1:5])
        assert lines["native"] == lines["chunked"] == "can run"
        assert lines["triton"] == "it runs on cuda, not on cpu"


def test_a_missing_extension_is_explained(monkeypatch, capsys):
    monkeypatch.setattr(backends, "extension", None)
    monkeypatch.setattr(backends, "extension_missing", "it is not built")
    text = report(capsys)
    assert "extension: it is not built" in text and "native     it is not built" in text


def test_a_gpu_that_nothing_was_built_for(monkeypatch, capsys):
    """As a T4 sees it."""

    class OnGPU(torch.Tensor):
        is_cuda, device = True, torch.device("cuda", 0)

    rows = torch.zeros(2, 128).as_subclass(OnGPU)
    monkeypatch.setattr(backends, "operations", lambda: ("contrastive",))
    monkeypatch.setattr(backends, "_architecture", lambda device: 75)
    monkeypatch.setattr(backends, "architecture_of", lambda device: 75)
    monkeypatch.setattr(
        backends, "extension", SimpleNamespace(
            allow_tf32=lambda: False,
            build_info=lambda: {"torch": "2", "compiler": "3", "cpu_instruction_set": "avx2",
                                "cuda_architectures": "8.0+PTX 9.0"})
    )  # fmt: skip
    for name, value in (
        ("is_available", True), ("device_count", 1), ("get_device_capability", (7, 5)), ("get_device_name", "Tesla T4"),
    ):  # fmt: skip
        monkeypatch.setattr(info.torch.cuda, name, lambda *_, value=value: value)
    real_zeros = torch.zeros
    monkeypatch.setattr(
        info.torch, "zeros", lambda *size, device: rows if device == "cuda" else real_zeros(*size)
    )
    text = report(capsys)
    assert "CUDA kernels: 8.0+PTX 9.0" in text and "cuda:0: Tesla T4, sm_75" in text
    on_cuda = text.split("contrastive on cuda")[1]
    assert (
        "native     its CUDA kernels were built for compute capability 8.0+PTX, 9.0, which does not"
        in on_cuda
    )
    assert "triton     its kernels need compute capability 8.0, this GPU has 7.5" in on_cuda
    assert "chunked    can run" in on_cuda and "first native: " in on_cuda


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
def test_output_that_cannot_be_written_is_one_line():
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-m", "ssl_kernels", "info"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr == "python -m ssl_kernels: error: [Errno 28] No space left on device\n"


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "main", interrupted)
    assert __main__.run() == 130
    assert capsys.readouterr().err == "python -m ssl_kernels: interrupted\n"


def test_a_reader_that_leaves_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as nobody:
        command = [sys.executable, "-m", "ssl_kernels", "info"]
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_numbers_shared_with_the_kernels_are_theirs():
    built = backends.extension.build_info()
    assert (constants.NORM_EPS, constants.KEPT_HEADER) == (built["norm_eps"], built["kept_header"])
    z = torch.randn(4, 8, requires_grad=True)
    kept = torch.ops.ssl_kernels.contrastive_fwd.native(
        z, None, torch.tensor(1.0), None, None, None, True, True, False, False, True, True
    )[-1]
    assert kept.shape == (constants.KEPT_HEADER,)
