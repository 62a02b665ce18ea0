"""Makes the emulator Triton's driver: `kernel[grid](cpu_tensors)` runs the compiled sm_80 or sm_90 code."""

import contextlib
import ctypes
import gc
import os

import torch

from . import build, ptx
from .cuda_runtime import DEVICES

# The driver interface is private to Triton: these are the versions the tests passed with.
TESTED_VERSIONS = ("3.6", "3.8")

CTYPES = {
    "i1": ctypes.c_int8,
    "i8": ctypes.c_int8,
    "u1": ctypes.c_uint8,
    "u8": ctypes.c_uint8,
    "i16": ctypes.c_int16,
    "u16": ctypes.c_uint16,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "fp32": ctypes.c_float,
    "f32": ctypes.c_float,
    "fp64": ctypes.c_double,
}


@contextlib.contextmanager
def emulated_triton(arch=80, executes=True, **options):
    """Runs Triton kernels on CPU tensors inside the block, compiled for sm_<arch>.

    Yields a list that receives a `ptx.Launch` for each kernel launched.

    Args:
        arch: 80 or 90.
        executes: False: launches are checked and recorded, but kernels do not run. Tensors may be on "meta".
        options: Fields of `ptx.Options`.

    Raises:
        RuntimeError: This Triton's version is not among TESTED_VERSIONS, or TRITON_INTERPRET is set.
        ptx.PtxError: From the launch, when the emulator notices something.
    """
    import triton
    from triton import knobs
    from triton.runtime import driver

    if not triton.__version__.startswith(tuple(version + "." for version in TESTED_VERSIONS)):
        raise RuntimeError(
            f"emulated_triton: tested with Triton {TESTED_VERSIONS}, this is {triton.__version__}"
        )
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError(
            "emulated_triton: TRITON_INTERPRET is set, kernels would be interpreted, not compiled"
        )
    if arch not in DEVICES:
        raise ValueError(f"emulated_triton: arch must be one of {sorted(DEVICES)}, got {arch}")
    emulated = _Driver(arch, ptx.Options(**options), executes)
    previous, driver._active = driver._active, emulated
    hooks = knobs.runtime.kernel_load_start_hook
    hooks.add(_keep_ptx)
    cache, knobs.cache.dir = knobs.cache.dir, str(build.CACHE / "triton")
    try:
        yield emulated.launches
    finally:
        _forget_kernels()  # while the driver is there that they are unloaded by
        driver._active = previous
        hooks.remove(_keep_ptx)
        knobs.cache.dir = cache


_loading = {}
_loaded = []  # the function of each kernel that Triton holds
MOST_LOADED = 200


def _forget_kernels():
    """Where Triton holds many kernels, it loads them again from its files: each has all texts of its compilation, and a
    program here, about two megabytes."""
    if len(_loaded) > MOST_LOADED:
        for function in _loaded:
            function.device_caches.clear()
        _loaded.clear()
        gc.collect()


def _keep_ptx(module, function, name, metadata_group, hash):
    """Triton hands only the cubin to load_binary, which follows at once: keep the PTX beside it."""
    path = next(path for key, path in metadata_group.items() if key.endswith(".ptx"))
    with open(path) as file:
        _loading["ptx"] = file.read()


class _Utils:
    """What Triton asks its driver's utilities for; a device's number is its architecture."""

    def get_device_properties(self, device):
        multiprocessors, shared_per_block, _, _ = DEVICES[device]
        return {
            "max_shared_mem": shared_per_block,
            "multiprocessor_count": multiprocessors,
            "max_num_regs": 65536,
            "warpSize": 32,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }

    def load_binary(self, name, cubin, shared, device):
        module = ptx.Module(_loading.pop("ptx"))
        registers, spills, max_threads = 0, 0, 1024
        return module, (module, name), registers, spills, max_threads

    def unload_module(self, module):
        pass


class _Launcher:
    def __init__(self, source, metadata):
        _loaded.append(source.fn)
        self.signature = dict(source.signature)
        self.metadata = metadata

    def __call__(
        self, grid_x, grid_y, grid_z, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args
    ):
        from triton.runtime import driver

        module, name = function
        values = [
            _argument(parameter, kind, value)
            for (parameter, kind), value in zip(self.signature.items(), args, strict=True)
            if kind != "constexpr"
        ]
        # The compiled kernel ends with pointers to scratch memory; kernels that need any are refused.
        if self.metadata.global_scratch_size or self.metadata.profile_scratch_size:
            raise ptx.PtxError(f"{name} needs scratch memory, which the emulator does not provide")
        missing = module.kernels[name].parameters - len(values)
        values += [ctypes.c_uint64(0)] * missing
        grid, block = (grid_x, grid_y, grid_z), (32 * self.metadata.num_warps, 1, 1)
        emulated = driver.active
        options = vars(emulated.options)
        ptx.check_grid(name, grid)
        counters = ptx.Counters()
        if emulated.executes:
            counters = module.launch(name, grid, block, values, shared=self.metadata.shared, **options)
        emulated.launches.append(ptx.Launch(name, grid, block, self.metadata.shared, counters, stream))


def _argument(parameter, kind, value):
    if not isinstance(kind, str):
        raise ptx.PtxError(f"argument {parameter}: tuples are not supported by the emulated driver")
    if kind.startswith("*"):
        return ctypes.c_uint64(0) if value is None else value
    if kind not in CTYPES:
        raise ptx.PtxError(f"argument {parameter}: type {kind} is not supported by the emulated driver")
    return CTYPES[kind](value)


class _Driver:
    launcher_cls = _Launcher

    def __init__(self, arch, options, executes):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)
        self.utils = _Utils()
        self.options = options
        self.executes = executes
        self.launches = []

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch

    def set_current_device(self, device):
        pass

    def get_device_capability(self, device):
        return divmod(self.target.arch, 10)

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return None

    def get_benchmarker(self):
        return _count_instructions


def _count_instructions(function, quantiles=None, **_):
    """Autotuning compares emulated warp instructions, the nearest thing to time there is here.

    Triton keeps this function with the tuned kernel, beyond the context: it looks the driver up.
    """
    from triton.runtime import driver

    launches = driver.active.launches
    before = len(launches)
    function()
    cost = sum(launch.counters.instructions for launch in launches[before:]) * 1e-6
    return [cost] * len(quantiles or [0])
