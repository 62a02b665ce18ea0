"""Where a GPU test runs: on emulated sm_80 or sm_90, or on the card when there is one. Same calls for all."""

import contextlib
import ctypes
import os

import torch

from . import build, ptx
from .cuda_runtime import STREAM, CudaError, EmulatedCudaLibrary
from .triton_driver import emulated_triton


class EmulatedGpu:
    """CPU tensors, kernels executed by the emulator."""

    emulated = True
    device = torch.device("cpu")

    def __init__(self, arch):
        self.arch = arch
        self.name = f"sm_{arch}"

    def module(self, text):
        """`ptx.Module` of PTX text."""
        return ptx.Module(text)

    def cuda_library(self, sources, **options):
        """`EmulatedCudaLibrary` of .cu files; its `call` runs their launchers."""
        return EmulatedCudaLibrary(sources, self.arch, **options)

    def triton(self, **options):
        """Context in which Triton kernels run here; yields the list of launches."""
        return emulated_triton(self.arch, **options)


class RealGpu:
    """CUDA tensors on the current card. Launches come back as an empty list: a card has no counters to
    give."""

    emulated = False
    device = torch.device("cuda")

    def __init__(self):
        major, minor = torch.cuda.get_device_capability()
        self.arch = 10 * major + minor
        self.name = f"card_sm_{self.arch}"

    def module(self, text):
        """A module with the `launch` of `ptx.Module`, for numpy arrays; the driver compiles the PTX."""
        return _CardModule(text)

    def cuda_library(self, sources, *, include_dirs=(), defines=(), multiprocessors=None):
        """The same files compiled for the card; multiprocessors is the card's own."""
        return _CardLibrary(build.cuda_library(sources, self.arch, include_dirs, defines))

    def triton(self, **options):
        """Triton's own driver; the emulator's options do not apply."""
        return contextlib.nullcontext([])


class _CardModule:
    """PTX text on the card. Source: CUDA Driver API, "Module Management" and "Execution Control"."""

    def __init__(self, text):
        torch.cuda.init()
        torch.zeros(1, device="cuda")  # makes the context of the device current
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._module = ctypes.c_void_p()
        self._check("cuModuleLoadData", ctypes.byref(self._module), text.encode())

    def _check(self, function, *args):
        code = getattr(self._driver, function)(*args)
        if code:
            raise ptx.PtxError(f"{function} returned {code}")

    def launch(self, name, grid, block, args, *, shared=0, read_only=(), buffers=None, **options):
        """As `ptx.Module.launch`; arrays are copied to the card and back. Returns zero counters."""
        function = ctypes.c_void_p()
        self._check("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
        on_card = [torch.from_numpy(arg.view("u1")).cuda() if ptx.is_buffer(arg) else None for arg in args]
        values = [
            arg if copy is None else ctypes.c_uint64(copy.data_ptr())
            for arg, copy in zip(args, on_card, strict=True)
        ]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
        sizes = [*(*grid, 1, 1)[:3], *(*block, 1, 1)[:3]]
        self._check("cuLaunchKernel", function, *sizes, shared, None, pointers, None)
        torch.cuda.synchronize()
        for arg, copy in zip(args, on_card, strict=True):
            if copy is not None:
                arg.view("u1")[...] = copy.cpu().numpy()
        return ptx.Counters()


class _CardLibrary:
    def __init__(self, path):
        self._library = ctypes.CDLL(str(path))

    def call(self, function, *args, buffers=None, read_only=(), stream=None, capturing=False, **options):
        """As `EmulatedCudaLibrary.call`, on the current stream unless one is given; waits for the end."""
        handle = torch.cuda.current_stream().cuda_stream if stream is None else stream
        values = []
        for arg in args:
            if ptx.is_buffer(arg):
                values.append(ctypes.c_void_p(arg.data_ptr()))
            else:
                values.append(ctypes.c_void_p(handle) if arg is STREAM else arg)
        entry = getattr(self._library, function)
        entry.restype = ctypes.c_int
        code = entry(*values)
        torch.cuda.synchronize()
        if code:
            raise CudaError(function, code, "")
        return []


def available_gpus():
    """What tests run on here: the card if torch sees one, else emulated architectures.

    Those are 80 and 90, or what SSL_KERNELS_EMULATED names ("90").
    """
    if torch.cuda.is_available():
        return [RealGpu()]
    return [EmulatedGpu(int(arch)) for arch in os.environ.get("SSL_KERNELS_EMULATED", "80 90").split()]
