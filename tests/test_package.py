"""The package as a user meets it: public names, their documentation, version and licence to import."""

import inspect
import pathlib
import runpy
import tomllib

import pytest
import setuptools
import torch

import ssl_kernels

ROOT = pathlib.Path(__file__).parent.parent
PUBLIC = [(module, name) for module in (ssl_kernels, ssl_kernels.nn) for name in module.__all__]


def test_public_names():
    assert {"nt_xent_loss", "nn", "use_backend", "backends_for"} <= set(ssl_kernels.__all__)
    assert "NTXentLoss" in ssl_kernels.nn.__all__


def test_everything_imported_into_a_room_is_exported():
    """`__all__` is written out, since type checkers read it."""
    assert ssl_kernels.losses.__all__ == sorted(
        name for name, value in vars(ssl_kernels.losses).items() if inspect.isfunction(value)
    )
    assert ssl_kernels.nn.__all__ == sorted(
        name
        for name, value in vars(ssl_kernels.nn).items()
        if inspect.isclass(value) or inspect.isfunction(value)
    )


@pytest.mark.parametrize("module, name", PUBLIC, ids=[f"{module.__name__}.{name}" for module, name in PUBLIC])
def test_public_names_exist_and_are_documented(module, name):
    assert inspect.getdoc(getattr(module, name)).strip()


def test_losses_document_their_contract():
    for name in ssl_kernels.__all__:
        if name.endswith("_loss"):
            text = inspect.getdoc(getattr(ssl_kernels, name))
            assert all(f"{part}:" in text for part in ("Args", "Returns", "Raises", "Source")), name


def test_every_loss_has_its_module():
    modules = {name.lower() for name in ssl_kernels.nn.__all__}
    for name in ssl_kernels.__all__:
        if name.endswith("_loss"):
            assert name.replace("_", "") in modules


def test_lines_of_cpp_have_at_most_110_columns():
    sources = [
        path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cpp", ".h", ".inc", ".cu", ".cuh")
    ]
    assert len(sources) > 100
    lines = [(path.name, line) for path in sources for line in path.read_text(encoding="utf-8").splitlines()]
    assert not [line for line in lines if len(line[1]) > 110]


def test_a_long_file_says_why_it_is_one():
    folders = ("csrc", "ssl_kernels", "tests", "benchmarks", "examples")
    suffixes = (".py", ".cpp", ".h", ".inc", ".cu", ".cuh")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in suffixes]
    assert len(sources) > 500
    for path in sources:
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 500 or "although a long" in " ".join(lines[:30]), path


def test_version_is_that_of_the_metadata():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)
    assert project["tool"]["setuptools"]["dynamic"]["version"]["attr"] == "ssl_kernels.__version__"
    assert all(part.isdigit() for part in ssl_kernels.__version__.split("."))


@pytest.mark.parametrize("capability, built", [((9, 0), ["9.0"]), ((8, 8), ["8.0+PTX"])])
def test_the_extension_is_built_for_the_gpu_present(capability, built, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SSL_KERNELS_CUDA", "0")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    for name, value in (("is_available", True), ("device_count", 2), ("get_device_capability", capability)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    assert runpy.run_path("setup.py")["cuda_architectures"]() == (built, "the GPUs present")


def test_machine_code_comes_from_one_ptx(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SSL_KERNELS_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    code_flags = runpy.run_path("setup.py")["code_flags"]
    assert code_flags(["10.0", "8.0+PTX", "9.0a"]) == [
        f"-gencode=arch=compute_80,code={code}" for code in ("sm_100", "sm_80", "sm_90a", "compute_80")
    ]
    assert code_flags(["9.0"]) == ["-gencode=arch=compute_90,code=sm_90"]
