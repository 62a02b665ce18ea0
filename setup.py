"""Builds the extension ssl_kernels._C: the C++ kernels always, the CUDA kernels where nvcc is found.

Environment:
    SSL_KERNELS_CUDA      auto (default): where nvcc and torch's CUDA fit together; 0: never; 1: or fail.
    TORCH_CUDA_ARCH_LIST  architectures, e.g. "8.0;9.0". Default: those of the GPUs present, else 8.0, 9.0 and 10.0
                          with the PTX of 8.0, which the driver compiles for what runs none of the three.
    SSL_KERNELS_SANITIZE  1: address and undefined-behaviour sanitizers in the C++ code.
"""

import glob
import os
import platform
import re
import shutil
import subprocess

import torch
from setuptools import setup
from setuptools.command.build_py import build_py
from torch.utils import cpp_extension

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
    link = []
    if platform.system() == "Linux":
        cxx.append("-fopenmp")  # at::parallel_for is a template: without it, it would run on one thread
    if os.environ.get("SSL_KERNELS_SANITIZE") == "1":
        cxx += ["-O1", "-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
        link += ["-fsanitize=address,undefined"]
    with_cuda, why = decide_cuda()
    say(f"C++ kernels: yes. CUDA kernels: {'yes' if with_cuda else 'no'} ({why})")
    if not with_cuda:
        return cpp_extension.CppExtension(
            "ssl_kernels._C", sources, extra_compile_args=cxx, extra_link_args=link
        )

    architectures, why = cuda_architectures()
    say(f"CUDA architectures: {', '.join(architectures)} ({why})")
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(architectures)
    cxx.append(f'-DSSL_KERNELS_CUDA_ARCHITECTURES="{" ".join(architectures)}"')
    sources += sorted(glob.glob("csrc/cuda/*.cu")) + sorted(glob.glob("csrc/**/*_cuda.cpp", recursive=True))
    return cpp_extension.CUDAExtension(
        "ssl_kernels._C",
        sources,
        extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "--threads=2", *WITH_HALF_CONVERSIONS]},
        extra_link_args=link,
    )


class BuildPackage(build_py):
    """Puts a line beside the package that Python runs when it starts: it patches what SSL_KERNELS_PATCH names."""

    def run(self):
        super().run()
        if not self.editable_mode:
            with open(os.path.join(self.build_lib, "ssl_kernels_patch.pth"), "w") as file:
                file.write('import os; os.environ.get("SSL_KERNELS_PATCH") and __import__("ssl_kernels")\n')


setup(
    ext_modules=[make_extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension, "build_py": BuildPackage},
)
