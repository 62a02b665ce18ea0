"""Runs GPU code without a GPU: the PTX that nvcc and Triton emit for sm_80 and sm_90, on CPU tensors.

What tests use (README.md says what this shows and what it cannot):

`gpu` and `nvcc` are fixtures (import them in a conftest.py from `tests.gpu_emulation.fixtures`). `gpu` is in
turn an emulated sm_80, an emulated sm_90, or only the real card where torch sees one. A test of CUDA code
takes both:

    def test_scale(gpu, nvcc):
        # Compiled by nvcc, cached by content.
        library = gpu.cuda_library(["csrc/cuda/scale.cu"], include_dirs=["csrc/cuda"])
        x = torch.ones(100, device=gpu.device)
        # extern "C" int scale_launch(float*, double, int, cudaStream_t)
        launches = library.call("scale_launch", x, 2.0, 100, STREAM)
        assert (x == 2).all()

`library.call(function, *args)`: a tensor passes its address and becomes memory that kernels may touch
(everything else is out of bounds); int passes as int, float as double, None as NULL, `STREAM` as the stream
handle, and ctypes values, structures and `ctypes.byref(...)` as they are. Tensors whose addresses lie in a
structure are named:

    class Args(ctypes.Structure):
        _fields_ = [("rows", ctypes.c_void_p), ("lse", ctypes.c_void_p), ("n", ctypes.c_int64)]

    args = Args(rows.data_ptr(), lse.data_ptr(), n)
    launches = library.call("contrastive_fwd", ctypes.byref(args), STREAM, buffers={"rows": rows, "lse": lse},
                            read_only={"rows"}, seed=3)

Launchers must be `extern "C"`, return int (cudaError_t, 0 for success) and be free of torch headers. The
runtime calls they may make are those of emulator/cudart.cpp; another one fails the link by its name.
`capturing=True` makes the stream one under graph capture: a call that synchronises or allocates then fails.
`executes=False` records launches without running their kernels: at sizes for which there is no memory. `device=`
is the number of the current device, `library.shared_limits()` tells what the last call set of kernels' shared memory.
`multiprocessors=` of `cuda_library` changes the number the device reports.

A Triton kernel runs unchanged inside a context:

    with gpu.triton(seed=1) as launches:
        kernel[grid](x, y, n, BLOCK=128)
    assert launches[-1].counters.mma == 64

With `executes=False` kernels do not run, and tensors may be on "meta".

Results: a list of `Launch(kernel, grid, block, shared, counters, stream)`; `Counters` has instructions, mma,
global_load_sectors, shared_wavefronts and so on (see `ptx.Counters`). On a card the lists are empty: guard
with `if gpu.emulated`.

Faults raise `PtxError`, saying what, in which block, warp, lane and PTX line. A launcher's nonzero code
raises `CudaError`. Options of every run, as keywords (see `ptx.Options`): bounds, races, grid_races,
warp_races, uninitialized, seed. One schedule does not show every race: run a few seeds, one of them with
warp_races=True.

For PTX text there is `Module(text).launch(name, grid, block, args, shared=0)`, and `ptx_text(source, arch)`
gives nvcc's. `emulated_triton(arch)` and `EmulatedCudaLibrary(sources, arch)` are what the runners use, for
tests of one architecture.
"""

from .build import BuildError, nvcc_path, ptx_text
from .cuda_runtime import STREAM, CudaError, EmulatedCudaLibrary
from .ptx import Counters, Launch, Module, Options, PtxError
from .runners import EmulatedGpu, RealGpu, available_gpus
from .triton_driver import emulated_triton

__all__ = [
    "STREAM",
    "BuildError",
    "Counters",
    "CudaError",
    "EmulatedCudaLibrary",
    "EmulatedGpu",
    "Launch",
    "Module",
    "Options",
    "PtxError",
    "RealGpu",
    "available_gpus",
    "emulated_triton",
    "nvcc_path",
    "ptx_text",
]
