"""The build says what to do where it cannot work, and the wheel holds the package alone."""

import os
import pathlib
import re
import runpy
import sys
import sysconfig
import tomllib

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def setup_py(monkeypatch):
    """A function that runs setup.py without building anything; its names."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SSL_KERNELS_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    return lambda: runpy.run_path("setup.py")


def program(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def refusal(call):
    with pytest.raises(SystemExit) as stopped:
        call()
    message = str(stopped.value)
    assert message.startswith("ssl_kernels: ") and "\n" not in message
    return message


def test_torch_is_missing(setup_py, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "Install torch 2.11 or later" in refusal(setup_py)


def test_torch_is_too_old(setup_py, monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.10.1+cpu")
    assert "must be 2.11 or later, got 2.10.1+cpu" in refusal(setup_py)


def test_ninja_is_missing(setup_py, monkeypatch, tmp_path):
    refuse = setup_py()["refuse_missing_tools"]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert "Run: pip install ninja" in refusal(refuse)


def test_ninja_of_an_environment_that_is_not_active_is_found(setup_py, monkeypatch, tmp_path):
    refuse = setup_py()["refuse_missing_tools"]
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    program(scripts, "ninja", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "nonesuch++")
    paths = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name: str(scripts) if name == "scripts" else paths(name)
    )
    assert "needs a C++ compiler" in refusal(refuse)  # ninja is looked for before


@pytest.mark.parametrize("command", ["nonesuch++", "sh nonesuch++"])
def test_compiler_is_missing(command, setup_py, monkeypatch):
    monkeypatch.setenv("CXX", command)
    message = refusal(setup_py()["refuse_missing_tools"])
    assert repr(command) in message and "apt install g++" in message


def test_headers_of_python_are_missing(setup_py, monkeypatch, tmp_path):
    refuse = setup_py()["refuse_missing_tools"]
    paths = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig, "get_path", lambda name: str(tmp_path) if name == "include" else paths(name)
    )
    assert "apt install python3-dev" in refusal(refuse)


def test_compiler_is_too_old(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", str(program(tmp_path, "g++-5", "echo 'unrecognized option -std' >&2; exit 1")))
    names = setup_py()
    message = refusal(names["refuse_missing_tools"])
    assert "too old" in message and "unrecognized option -std" in message and "CXX=g++-12" in message
    assert names["standard_of_torch"]() in message


@pytest.mark.parametrize("options", ["", " -m64"])
def test_the_compiler_that_is_here_will_do(options, setup_py, monkeypatch):
    monkeypatch.setenv("CXX", os.environ.get("CXX", "c++") + options)
    setup_py()["refuse_missing_tools"]()


def test_a_failed_build_says_what_may_help(setup_py, monkeypatch):
    names = setup_py()

    def fail(self):
        raise RuntimeError("Error compiling objects for extension")

    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", fail)
    build = names["BuildExtension"](setuptools.Distribution())
    message = refusal(build.build_extensions)
    assert "Error compiling" in message and "SSL_KERNELS_CUDA=0" in message and "MAX_JOBS=1" in message


def test_the_wheel_holds_every_package_and_no_test():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = set(setuptools.find_packages(ROOT, **settings["packages"]["find"]))
    folders = {path.parent for path in (ROOT / "ssl_kernels").glob("**/*.py")}
    assert packages == {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert (
        settings["package-data"]["ssl_kernels"] == ["py.typed"]
        and (ROOT / "ssl_kernels" / "py.typed").exists()
    )


def test_the_source_distribution_takes_what_the_build_reads():
    """setuptools takes Python files and the sources that it is given: not headers, nor what nvcc alone compiles."""
    taken = re.findall(r"^graft (\S+)", (ROOT / "MANIFEST.in").read_text(), re.MULTILINE)
    read = set(re.findall(r'glob\("(\w+)/', (ROOT / "setup.py").read_text()))
    assert read and read <= set(taken)
