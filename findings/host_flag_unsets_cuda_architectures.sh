#!/usr/bin/env bash
# torch 2.14.1 and 2.11.0, torch.utils.cpp_extension: a flag for the host's compiler among those for nvcc (-march=native by
# way of --compiler-options), or the path of a folder such as research/include, makes BuildExtension ignore TORCH_CUDA_ARCH_LIST
# and the GPUs present, without a word. It looks for the letters "arch" anywhere in any flag, takes that for a choice of
# architectures, and passes no -gencode at all. nvcc then compiles for its own default (compute_75 for CUDA 13), which a GPU that
# was asked for runs only by way of the driver's compiler, and which has no instruction of Ampere or later: kernels behind
# #if __CUDA_ARCH__ >= 800 take their other branch everywhere. Who gives such a flag gives -gencode beside it.
#
# A stand-in for nvcc that writes down its arguments is enough to see it; neither a GPU nor a toolkit is needed.
#
# Seen, for TORCH_CUDA_ARCH_LIST="8.0;9.0": -O3 alone: compute_80 and compute_90; with either flag: none.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder/cuda/bin" "$folder/cuda/lib64" "$folder/cuda/include" "$folder/research/include"
cat > "$folder/cuda/bin/nvcc" <<'SH'
#!/usr/bin/env bash
[ "$1" = --version ] && { echo "Cuda compilation tools, release 13.0, V13.0.0"; exit; }
echo "$@" >> "$NVCC_ARGUMENTS"
while [ $# -gt 0 ]; do [ "$1" = -o ] && object=$2; shift; done
exec g++ -c -x c++ /dev/null -o "$object"
SH
chmod +x "$folder/cuda/bin/nvcc"
g++ -shared -x c++ /dev/null -o "$folder/cuda/lib64/libcudart.so"
touch "$folder/kernel.cu"
cat > "$folder/setup.py" <<'PY'
import os

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CUDAExtension

flags = {"cxx": ["-O3"], "nvcc": os.environ["NVCC_FLAGS"].split()}
extension = CUDAExtension("kernel", ["kernel.cu"], extra_compile_args=flags)
setup(name="kernel", ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
PY
cat > "$folder/try.py" <<'PY'
import os
import re
import shutil
import subprocess
import sys

CASES = {
    "-O3": ["80", "90"],
    "-O3 --compiler-options -march=native": [],
    f"-O3 -I{os.getcwd()}/research/include": [],
}
for flags, expected in CASES.items():
    shutil.rmtree("build", ignore_errors=True)
    settings = {"NVCC_FLAGS": flags, "NVCC_ARGUMENTS": f"{os.getcwd()}/arguments", "TORCH_CUDA_ARCH_LIST": "8.0;9.0"}
    settings["CUDA_HOME"] = f"{os.getcwd()}/cuda"
    open("arguments", "w").close()
    command = [sys.executable, "setup.py", "-q", "build"]
    subprocess.run(command, check=True, env=os.environ | settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    arguments = open("arguments").read()
    assert flags.split()[-1] in arguments, arguments
    found = sorted(set(re.findall(r"arch=compute_(\d+)", arguments)))
    print(f"{flags.replace(os.getcwd(), '...')}: {found or 'no architecture'}")
    assert found == expected, "torch behaves differently now"
PY
cd "$folder"
for version in 2.14.1 2.11.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install --quiet --disable-pip-version-check torch==$version numpy==2.2.6 setuptools==80.9.0 ninja==1.13.0
  PATH="$folder/$version/bin:$PATH" "$folder/$version/bin/python" try.py
done
