"""Builds the emulator, the stand-in CUDA runtime and emulated or real CUDA libraries, cached by content.

Everything lands in build/gpu_emulation/<name>-<hash of sources and flags>/ under the repository root. A
finished folder appears by one rename under a lock, so processes that build at once neither clash nor build
twice.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = REPOSITORY / "build" / "gpu_emulation"
EMULATOR = Path(__file__).resolve().parent / "emulator"
RUNTIME_SOURCE = EMULATOR / "cudart.cpp"

# No contraction: a PTX mul followed by an add must round twice. Register rows hold whatever type the
# instruction makes of them.
CXX_FLAGS = (
    "-std=c++20 -O2 -fPIC -fvisibility=hidden -Wall -Wextra -ffp-contract=off -fno-strict-aliasing".split()
)
NVCC_FLAGS = ["-std=c++17", "-O2"]
# g++ makes statics of inline functions one to a process, and a library that has such a static is never unloaded.
# clang++ does neither and does not know the flag.
UNIQUE_FLAG = "-fno-gnu-unique"


class BuildError(RuntimeError):
    """A compiler refused; the message holds the command and what it printed."""


def nvcc_path():
    """Path of nvcc: $CUDACXX, else $CUDA_HOME/bin/nvcc, else the one on PATH; None where there is none."""
    candidates = [os.environ.get("CUDACXX")]
    if "CUDA_HOME" in os.environ:
        candidates.append(os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc"))
    candidates.append("nvcc")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def emulator_library():
    """Path of the emulator as a shared library, for `ptx.Module`."""

    def build(folder):
        _run([_cxx(), "-shared", *_emulator_objects(), "-o", folder / "libptx.so"])

    return _cached("ptx", [*_emulator_sources(), *_cxx_flags()], build) / "libptx.so"


def emulated_cuda_library(sources, arch, include_dirs=(), defines=()):
    """Compiles .cu files to PTX for sm_<arch> and links them with the emulator in the place of libcudart.

    Args:
        sources: Paths of .cu files free of torch headers.
        arch: 80 or 90.
        include_dirs: Further folders for #include.
        defines: Macros as "NAME" or "NAME=value".

    Returns:
        Path of the shared library. A runtime call that cudart.cpp does not offer fails the link, by name.

    Raises:
        BuildError: nvcc or the linker refused.
    """
    flags = [f"-arch=compute_{arch}", "--compress-mode=none", *_preprocessor_flags(include_dirs, defines)]

    def build(folder):
        objects = _cuda_objects(sources, flags, include_dirs)
        key = [*_emulator_sources(), *_host_flags(), _nvcc_version()]
        runtime = _cached("cudart", key, _build_runtime) / "cudart.o"
        # Hidden symbols, resolved here: torch's own libcudart in the process is never reached.
        inputs = [*objects, runtime, *_emulator_objects()]
        _run([_cxx(), "-shared", "-Wl,-z,defs", "-Wl,-Bsymbolic", *inputs, "-o", folder / "libkernels.so"])

    key = [
        *_with_includes(sources, include_dirs),
        *flags,
        *_cxx_flags(),
        *_emulator_sources(),
        _nvcc_version(),
    ]
    return _cached(f"sm_{arch}", key, build) / "libkernels.so"


def cuda_library(sources, arch, include_dirs=(), defines=()):
    """Path of a library of the same .cu files, compiled for the card at hand with the real libcudart."""
    flags = [f"-arch=sm_{arch}", *_preprocessor_flags(include_dirs, defines)]

    def build(folder):
        objects = _cuda_objects(sources, flags, include_dirs)
        _run([nvcc_path(), "-shared", "--cudart", "shared", *objects, "-o", folder / "libkernels.so"])

    key = [*_with_includes(sources, include_dirs), *flags, _nvcc_version()]
    return _cached(f"card_sm_{arch}", key, build) / "libkernels.so"


def ptx_text(source, arch, include_dirs=(), defines=()):
    """PTX that nvcc makes of one .cu file for sm_<arch>."""
    flags = [f"-arch=compute_{arch}", *_preprocessor_flags(include_dirs, defines)]

    def build(folder):
        _run([nvcc_path(), *NVCC_FLAGS, *flags, "-ptx", source, "-o", folder / "kernels.ptx"])

    key = [*_with_includes([source], include_dirs), *flags, _nvcc_version()]
    return (_cached("ptx_text", key, build) / "kernels.ptx").read_text()


def _emulator_sources():
    return sorted(path for path in EMULATOR.rglob("*") if path.suffix in (".h", ".cpp"))


def _emulator_objects():
    units = [path for path in _emulator_sources() if path.suffix == ".cpp" and path != RUNTIME_SOURCE]

    def compile_unit(path):
        def build(folder):
            _run([_cxx(), *_cxx_flags(), "-c", path, "-o", folder / "unit.o"])

        return _cached(f"object_{path.stem}", [*_with_includes([path], []), *_cxx_flags()], build) / "unit.o"

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(compile_unit, units))


def _build_runtime(folder):
    host = _host_flags("-fPIC", "-fvisibility=hidden", "-Wall")
    _run([nvcc_path(), *NVCC_FLAGS, *host, "-c", RUNTIME_SOURCE, "-o", folder / "cudart.o"])


def _cuda_objects(sources, flags, include_dirs):
    host = _host_flags("-fPIC")

    def compile_unit(path):
        def build(folder):
            _run([nvcc_path(), *NVCC_FLAGS, *host, *flags, "-c", path, "-o", folder / "unit.o"])

        key = [*_with_includes([path], include_dirs), *host, *flags, _nvcc_version()]
        return _cached(f"cuda_{Path(path).stem}", key, build) / "unit.o"

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        return list(pool.map(compile_unit, sources))


def _preprocessor_flags(include_dirs, defines):
    return [*(f"-I{path}" for path in include_dirs), *(f"-D{macro}" for macro in defines)]


def _cxx():
    return os.environ.get("CXX", "g++")


def _host_flags(*flags):
    """For nvcc, which hands them to its host compiler."""
    return ["-Xcompiler", ",".join([*flags, *_unique_flags("g++")])]


@functools.lru_cache
def _unique_flags(compiler):
    tried = [compiler, UNIQUE_FLAG, "-E", "-x", "c++", "/dev/null"]
    return [UNIQUE_FLAG] if subprocess.run(tried, capture_output=True).returncode == 0 else []


@functools.lru_cache
def _cxx_flags():
    """Adds AVX2, FMA and half conversions where this machine has them: the cache never leaves it."""
    wanted = ("avx2", "fma", "f16c", "bmi2")
    try:
        cpu = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpu = ""
    supported = all(f" {name}" in cpu for name in wanted)
    native = [f"-m{name}" for name in wanted] if supported else []
    return (*CXX_FLAGS, *native, *_unique_flags(_cxx()))


@functools.lru_cache
def _nvcc_version():
    if nvcc_path() is None:
        raise BuildError("nvcc not found: set CUDACXX or CUDA_HOME, or put nvcc on PATH")
    return subprocess.run([nvcc_path(), "--version"], capture_output=True, text=True, check=True).stdout


def _with_includes(sources, include_dirs):
    """The sources and every file they reach by #include "...", beside the includer or in include_dirs."""
    found, pending = [], [Path(source).resolve() for source in sources]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        found.append(path)
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            folders = [path.parent, *(Path(folder).resolve() for folder in include_dirs)]
            pending += [folder / name for folder in folders if (folder / name).is_file()][:1]
    return found


def _cached(name, key, build):
    """Folder that `build(folder)` fills, once for each value of key; a Path in it counts by its content."""
    digest = hashlib.sha256()
    for part in key:
        if isinstance(part, Path):
            digest.update(part.name.encode() + b"\0" + part.read_bytes() + b"\0")
        else:
            digest.update(str(part).encode() + b"\0")
    folder = CACHE / f"{name}-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with _locked(CACHE / f"{folder.name}.lock"):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
                made = Path(scratch) / "made"
                made.mkdir()
                build(made)
                made.rename(folder)
    return folder


@contextlib.contextmanager
def _locked(path):
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _run(command):
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(" ".join(command) + "\n" + done.stdout + done.stderr)
