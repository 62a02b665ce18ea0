"""Builds the extension ssl_kernels._C: the C++ kernels always, the CUDA kernels where nvcc is found.

Environment:
    SSL_KERNELS_CUDA      auto (default): where nvcc and torch's CUDA fit together; 0: never; 1: or fail.
    TORCH_CUDA_ARCH_LIST  architectures, e.g. "8.0;9.0". Default: those of the GPUs present, else 8.0, 9.0 and 10.0
                          with the PTX of 8.0, which the driver compiles for what runs none of the three.
    SSL_KERNELS_SANITIZE  1: address and undefined-behaviour sanitizers in the C++ code.
"""

import glob
import os
import pathlib
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig

from setuptools import setup
from setuptools.command.build_py import build_py

OLDEST_TORCH = (2, 11)
INSTALL = "pip install --no-build-isolation ."
try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"ssl_kernels: the build needs torch, and {sys.executable} cannot import it ({error})."
        f" Install torch 2.11 or later into this environment first, then run: {INSTALL}"
    ) from None
if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
    raise SystemExit(
        f"ssl_kernels: torch must be 2.11 or later, got {torch.__version__}. Upgrade it, then run: {INSTALL}"
    )

CUDA_ARCHITECTURES_WITHOUT_GPU = ["8.0+PTX", "9.0", "10.0"]
# torch forbids the implicit conversions of __half and __nv_bfloat16; the kernels include no torch header and use them.
WITH_HALF_CONVERSIONS = ["-U__CUDA_NO_HALF_CONVERSIONS__", "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]
WITH_HALF_CONVERSIONS += ["-U__CUDA_NO_HALF_OPERATORS__", "-U__CUDA_NO_HALF2_OPERATORS__"]


def say(message):
    print(f"ssl_kernels: {message}", flush=True)


def nvcc_version_and_root():
    """(major, root) of the nvcc that runs here, or a sentence that says why there is none.

    nvcc may be a wrapper script, from whose path the toolkit's root cannot be told: ask nvcc itself.
    """
    nvcc = os.path.join(os.environ["CUDA_HOME"], "bin", "nvcc") if "CUDA_HOME" in os.environ else "nvcc"
    if not shutil.which(nvcc):
        return None, f"no {nvcc} on this machine"
    version = re.search(
        r"release (\d+)\.", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry_run, re.MULTILINE)
    if not version or not top:
        return None, f"{nvcc} does not tell its version and root"
    return int(version.group(1)), os.path.normpath(top.group(1).strip())


def decide_cuda():
    """(whether to build the CUDA kernels, why)."""
    wish = os.environ.get("SSL_KERNELS_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"setup.py: SSL_KERNELS_CUDA must be auto, 0 or 1, got {wish!r}")
    if wish == "0":
        return False, "SSL_KERNELS_CUDA=0"
    major, root = nvcc_version_and_root()
    if major is None:
        obstacle = root
    elif torch.version.cuda is None:
        obstacle = f"torch {torch.__version__} was built without CUDA"
    elif major != int(torch.version.cuda.split(".")[0]):
        obstacle = f"nvcc is CUDA {major} but torch was built with CUDA {torch.version.cuda}"
    else:
        os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = root
        return True, f"nvcc of CUDA {major} in {root}"
    if wish == "1":
        raise SystemExit(f"setup.py: SSL_KERNELS_CUDA=1 but {obstacle}")
    return False, obstacle


def cuda_architectures():
    """(list like ["8.0", "9.0"], why)."""
    if wanted := os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; "):
        found = re.split(r"[;\s]+", wanted)
        if not all(re.fullmatch(r"\d+\.\d+[af]?(\+PTX)?", name) for name in found):
            raise SystemExit(
                f'setup.py: TORCH_CUDA_ARCH_LIST must list numbers, as "8.0;9.0+PTX", got {wanted!r}'
            )
        return found, f"TORCH_CUDA_ARCH_LIST={wanted}"
    if torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        # nvcc 13 compiles for 8.8, but torch (2.14) refuses to ask for it: the driver compiles PTX there.
        names = ["8.0+PTX" if each == (8, 8) else "{}.{}".format(*each) for each in sorted(found)]
        return names, "the GPUs present"
    return CUDA_ARCHITECTURES_WITHOUT_GPU, "no GPU here"


def code_flags(architectures):
    """nvcc's flags for a list like ["8.0+PTX", "9.0"]: machine code for each, from the PTX of the least.

    No kernel asks for its architecture. To make PTX takes nvcc most of its time, and that for 9.0 is that for 8.0 but
    for the instruction that widens a bfloat16 number.
    """
    names = [name.removesuffix("+PTX").replace(".", "") for name in architectures]
    least = min(int(name.rstrip("af")) for name in names)
    codes = [f"sm_{name}" for name in names]
    if any(name.endswith("+PTX") for name in architectures):
        codes.append(f"compute_{least}")
    return [f"-gencode=arch=compute_{least},code={code}" for code in codes]


def make_extension():
    sources = sorted(
        {*glob.glob("csrc/**/*.cpp", recursive=True)} - {*glob.glob("csrc/**/*_cuda.cpp", recursive=True)}
    )
    # No -march: csrc/cpu/tile_math.cpp holds code for several instruction sets and picks at run time. Without
    # -fno-trapping-math and -fno-math-errno GCC does not vectorise its selects; neither changes a result.
    cxx = [
        "-O3",
        "-g0",  # Python's own flags ask for debugging information, twice the size of the rest
        "-fno-trapping-math",
        "-fno-math-errno",
        "-Wall",
        f'-DSSL_KERNELS_TORCH_VERSION="{torch.__version__}"',
    ]
    link, include = [], [write_fingerprint()]
    if platform.system() == "Linux":
        cxx.append("-fopenmp")  # at::parallel_for is a template: without it, it would run on one thread
    if os.environ.get("SSL_KERNELS_SANITIZE") == "1":
        # Null pointers and ends of objects are the address sanitizer's too, and make the build a quarter longer.
        undefined = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size,vptr"]
        cxx += ["-O1", *undefined, "-fno-omit-frame-pointer", "-g1"]
        link += ["-fsanitize=address,undefined"]
    with_cuda, why = decide_cuda()
    say(f"C++ kernels: yes. CUDA kernels: {'yes' if with_cuda else 'no'} ({why})")
    if not with_cuda:
        return cpp_extension.CppExtension(
            "ssl_kernels._C",
            sources,
            include_dirs=include,
            extra_compile_args=cxx,
            extra_link_args=link,
        )

    architectures, why = cuda_architectures()
    say(f"CUDA architectures: {', '.join(architectures)} ({why})")
    cxx.append(f'-DSSL_KERNELS_CUDA_ARCHITECTURES="{" ".join(architectures)}"')
    sources += sorted(glob.glob("csrc/cuda/*.cu")) + sorted(glob.glob("csrc/**/*_cuda.cpp", recursive=True))
    return cpp_extension.CUDAExtension(
        "ssl_kernels._C",
        sources,
        include_dirs=include,
        extra_compile_args={
            "cxx": cxx,
            "nvcc": ["-O3", "--threads=2", *WITH_HALF_CONVERSIONS, *code_flags(architectures)],
        },
        extra_link_args=link,
    )


def write_fingerprint():
    """build/sources/fingerprint.h, which tells the extension what it is built from. Returns its folder."""
    fingerprint = runpy.run_path("ssl_kernels/_sources.py")["fingerprint"]("csrc")
    header = pathlib.Path("build/sources/fingerprint.h").absolute()
    text = f'#define SSL_KERNELS_SOURCES "{fingerprint}"\n'
    if not header.exists() or header.read_text() != text:  # a file that is touched is compiled anew
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return str(header.parent)


def standard_of_torch():
    """The C++ standard that torch's headers ask for, as compilers name it."""
    header = pathlib.Path(torch.__file__).parent / "include/torch/csrc/api/include/torch/all.h"
    return "c++20" if "202002L" in header.read_text() else "c++17"


def refuse_missing_tools():
    """Ends the build with a sentence where something that it needs is missing."""
    scripts = sysconfig.get_path("scripts")  # of an environment that may not be activated
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), scripts])
    if not shutil.which("ninja"):
        raise SystemExit(f"ssl_kernels: the build needs ninja. Run: pip install ninja, then: {INSTALL}")
    command = shlex.split(os.environ.get("CXX", "c++"))
    programs = [part for part in command if not part.startswith("-")]  # "ccache g++ -m64"
    if not programs or not all(map(shutil.which, programs)):
        raise SystemExit(
            f"ssl_kernels: the build needs a C++ compiler, and there is no {' '.join(command) or 'c++'!r} here. Install"
            " one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; conda: conda install cxx-compiler),"
            " or name yours: CXX=clang++"
        )
    header = os.path.join(sysconfig.get_path("include"), "Python.h")
    if not os.path.exists(header):
        raise SystemExit(
            f"ssl_kernels: the build needs the headers of Python, and there is no {header}. Install them (Debian,"
            " Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)"
        )
    standard = standard_of_torch()
    includes = {"c++17": "#include <optional>\n", "c++20": "#include <concepts>\n#include <span>\n"}[standard]
    probe = [*command, f"-std={standard}", "-x", "c++", "-fsyntax-only", "-"]
    tried = subprocess.run(probe, input=includes, capture_output=True, text=True)
    if tried.returncode:
        first = (tried.stderr.strip().splitlines() or ["no message"])[0]
        raise SystemExit(
            f"ssl_kernels: the C++ compiler {' '.join(command)!r} is too old, or is not whole: the headers of torch"
            f" {torch.__version__} need {standard}, and it says: {first}. Install a newer one (g++ 12 is known to"
            " work) and name it: CXX=g++-12"
        )


class BuildExtension(cpp_extension.BuildExtension):
    """Says what to do where the build cannot work or has failed."""

    def __init__(self, *args, **options):
        refuse_missing_tools()
        super().__init__(*args, **options)

    def build_extensions(self):
        try:
            super().build_extensions()
        except Exception as error:
            raise SystemExit(
                f"ssl_kernels: the build failed ({error}); the first error of the compiler is above. If it is nvcc's,"
                " SSL_KERNELS_CUDA=0 leaves the CUDA kernels out. If the compiler was killed, memory ran out:"
                " MAX_JOBS=1 compiles one file at a time. Without the extension the package runs in plain PyTorch."
            ) from error


class BuildPackage(build_py):
    """Puts a line beside the package that Python runs when it starts: it patches what SSL_KERNELS_PATCH names."""

    def run(self):
        super().run()
        if not self.editable_mode:
            with open(os.path.join(self.build_lib, "ssl_kernels_patch.pth"), "w") as file:
                file.write('import os; os.environ.get("SSL_KERNELS_PATCH") and __import__("ssl_kernels")\n')


setup(
    ext_modules=[make_extension()],
    cmdclass={"build_ext": BuildExtension, "build_py": BuildPackage},
)
