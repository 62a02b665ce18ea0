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


NVCC = """case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.1" ;;
  *) echo "#$ TOP={root}/bin/.." >&2 ;;
esac"""


@pytest.mark.parametrize(
    "wish, nvcc, of_torch, builds, why",
    [
        ("0", "13.0", "13.0", False, "SSL_KERNELS_CUDA=0"),
        ("auto", "13.2", "13.0", True, "nvcc of CUDA 13 in "),
        ("1", "13.2", "13.0", True, "nvcc of CUDA 13 in "),
        ("auto", None, "13.0", False, "no nvcc on this machine"),
        ("auto", "13.0", None, False, "was built without CUDA"),
        ("auto", "12.8", "13.0", False, "nvcc is CUDA 12 but torch was built with CUDA 13.0"),
        ("auto", "", "13.0", False, "does not tell its version and root"),
        ("1", "12.8", "13.0", None, "SSL_KERNELS_CUDA=1 but nvcc is CUDA 12"),
        ("yes", "13.0", "13.0", None, "SSL_KERNELS_CUDA must be auto, 0 or 1, got 'yes'"),
    ],
)
def test_whether_the_cuda_kernels_are_built(
    wish, nvcc, of_torch, builds, why, setup_py, monkeypatch, tmp_path
):
    """The toolkit's root is what nvcc tells, which may be a script that lies elsewhere."""
    decide = setup_py()["decide_cuda"]
    if nvcc is not None:
        program(tmp_path, "nvcc", NVCC.format(version=nvcc, root=tmp_path) if nvcc else "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "elsewhere")
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    monkeypatch.setenv("SSL_KERNELS_CUDA", wish)
    if builds is None:
        with pytest.raises(SystemExit, match=why):
            decide()
        return
    found, reason = decide()
    assert found == builds and why in reason
    assert (os.environ.get("CUDA_HOME"), cpp_extension.CUDA_HOME) == (
        (str(tmp_path), str(tmp_path)) if builds else (None, "elsewhere")
    )


@pytest.mark.parametrize(
    "listed, found",
    [
        ("8.0;9.0+PTX", ["8.0", "9.0+PTX"]),
        (" 9.0a  10.0f ", ["9.0a", "10.0f"]),
        ("8", None),
        ("8.0,9.0", None),
    ],
)
def test_architectures_that_are_listed(listed, found, setup_py, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    names = setup_py()
    if found is None:
        with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST must list numbers"):
            names["cuda_architectures"]()
    else:
        assert names["cuda_architectures"]()[0] == found


def test_without_a_gpu_three_architectures_and_ptx(setup_py, monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert setup_py()["cuda_architectures"]() == (["8.0+PTX", "9.0", "10.0"], "no GPU here")


def test_what_is_compiled(setup_py, monkeypatch):
    """Sources of the CPU always, those of CUDA with it alone; the sanitizers where they are asked for."""
    names = setup_py()
    extension = names["make_extension"]()
    sources = set(extension.sources)
    every = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.cpp")}
    assert sources == {path for path in every if not path.endswith("_cuda.cpp")} and len(sources) > 30
    assert not any("sanitize" in flag for flag in extension.extra_compile_args + extension.extra_link_args)
    assert f'-DSSL_KERNELS_TORCH_VERSION="{torch.__version__}"' in extension.extra_compile_args
    monkeypatch.setenv("SSL_KERNELS_SANITIZE", "1")
    extension = names["make_extension"]()
    for flags in (extension.extra_compile_args, extension.extra_link_args):
        assert "-fsanitize=address,undefined" in flags


@pytest.mark.parametrize("editable", [False, True])
def test_a_wheel_patches_where_python_starts(editable, setup_py, tmp_path, monkeypatch):
    kind = setup_py()["BuildPackage"]
    monkeypatch.setattr(kind.__mro__[1], "run", lambda self: None)
    build = kind(setuptools.Distribution())
    build.editable_mode, build.build_lib = editable, str(tmp_path)
    build.run()
    line = tmp_path / "ssl_kernels_patch.pth"
    assert line.exists() != editable
    if not editable:  # site.py runs a line that begins with import
        imported = []
        monkeypatch.setattr("builtins.__import__", lambda name, *rest: imported.append(name) or os)
        for value in (None, "lightly"):
            monkeypatch.delenv("SSL_KERNELS_PATCH", raising=False)
            if value:
                monkeypatch.setenv("SSL_KERNELS_PATCH", value)
            exec(line.read_text())
        monkeypatch.undo()
        assert line.read_text().startswith("import ") and imported.count("ssl_kernels") == 1


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
