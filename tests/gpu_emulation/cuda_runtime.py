"""CUDA launchers on CPU tensors: the library nvcc built, with the emulator in the place of libcudart."""

import _ctypes
import ctypes

from . import build, ptx

# (multiprocessors, shared memory a block can ask for, shared memory of a multiprocessor, L2 bytes) of A100
# and H100. Source: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; A100 and
# H100 white papers.
DEVICES = {80: (108, 166912, 167936, 41943040), 90: (132, 232448, 233472, 52428800)}


class CudaError(RuntimeError):
    """A launcher returned a nonzero code: `code`, a cudaError_t, and the runtime's message."""

    def __init__(self, function, code, message):
        super().__init__(f"{function} returned {code}" + (f": {message}" if message else ""))
        self.code = code


class _Device(ctypes.Structure):
    _fields_ = [
        ("compute_capability", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("shared_per_block", ctypes.c_int32),
        ("shared_per_multiprocessor", ctypes.c_int32),
        ("l2_bytes", ctypes.c_int32),
        ("capturing", ctypes.c_int32),
        ("ordinal", ctypes.c_int32),
        ("executes", ctypes.c_int32),
    ]


class _Attribute(ctypes.Structure):
    _fields_ = [("kernel", ctypes.c_char_p), ("device", ctypes.c_int32), ("value", ctypes.c_int32)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("kernel", ctypes.c_char_p),
        ("shape", ptx.LaunchShape),
        ("stream", ctypes.c_uint64),
        ("counters", ctypes.c_void_p),
        ("warnings", ctypes.c_char_p),
    ]


class EmulatedCudaLibrary:
    """The `extern "C" int launcher(...)` functions of some .cu files, run on CPU tensors.

    Args:
        sources, include_dirs, defines: As `build.emulated_cuda_library` takes them.
        arch: 80 or 90: the PTX that runs and the device that the runtime reports.
        multiprocessors: Overrides the device's number, to reach other branches of a launcher.
    """

    def __init__(self, sources, arch, *, include_dirs=(), defines=(), multiprocessors=None):
        if arch not in DEVICES:
            raise ValueError(f"arch must be one of {sorted(DEVICES)}, got {arch}")
        self.arch = arch
        self._device = [arch, *DEVICES[arch]]
        if multiprocessors is not None:
            self._device[1] = multiprocessors
        self._library = ctypes.CDLL(str(build.emulated_cuda_library(sources, arch, include_dirs, defines)))
        self._library.emulated_launch.restype = ctypes.POINTER(_Launch)
        self._library.emulated_attribute.restype = ctypes.POINTER(_Attribute)
        self._library.emulated_fault.restype = ctypes.c_char_p

    def call(
        self, function, *args, buffers=None, read_only=(), stream=0, capturing=False, device=0, executes=True, **options
    ):  # fmt: skip
        """Calls `int function(args..., [cudaStream_t])` and runs the kernels it launches.

        Args:
            function: Name of the launcher.
            args: Tensors or arrays (their address is passed and they become buffers that kernels may touch),
                ints (passed as int), floats (as double), None (NULL), or any ctypes value, structure or
                `ctypes.byref`. `STREAM` stands for the stream handle.
            buffers: Further tensors or arrays by name, such as those whose address lies in a structure.
            read_only: Names in buffers, or positions in args, that no kernel may write.
            stream: The handle that `STREAM` passes; each `Launch` tells which one it got.
            capturing: The stream is under graph capture: synchronising or allocating calls fail as on a card.
            device: Number of the current device; all are alike.
            executes: False: launches are checked and recorded, but their kernels do not run.
            options: Fields of `ptx.Options`.

        Returns:
            List of `ptx.Launch`, in order.

        Raises:
            ptx.PtxError: The emulator noticed a fault, or the launcher made a call that the stand-in refuses.
            CudaError: The launcher returned a nonzero code.
        """
        regions, values = [], []
        for i, arg in enumerate(args):
            if ptx.is_buffer(arg):
                regions.append(ptx.region(f"argument {i}", arg, i in read_only))
                values.append(ctypes.c_void_p(regions[-1].address))
            else:
                values.append(ctypes.c_void_p(stream) if arg is STREAM else _as_ctypes(arg))
        regions += [ptx.region(name, buffer, name in read_only) for name, buffer in (buffers or {}).items()]
        device = _Device(*self._device, int(capturing), device, int(executes))
        options = ptx.native_options(ptx.Options(**options))
        self._library.emulated_begin(
            ctypes.byref(device),
            ctypes.byref(options),
            ptx.region_array(regions),
            ctypes.c_size_t(len(regions)),
        )
        entry = getattr(self._library, function)
        entry.restype = ctypes.c_int
        code = entry(*values)
        fault = self._library.emulated_fault().decode()
        if fault:
            raise ptx.PtxError(fault)
        if code:
            raise CudaError(function, code, ctypes.string_at(self._error_string(code)).decode())
        return [self._launch(i) for i in range(self._library.emulated_launch_count())]

    def close(self):
        """Unloads the library, whose decoded kernels take up to 100 MB. Nothing may be called after it."""
        _ctypes.dlclose(self._library._handle)
        del self._library

    def shared_limits(self):
        """[(kernel, device, bytes)]: each setting of a kernel's most dynamic shared memory by the last call."""
        records = [
            self._library.emulated_attribute(ctypes.c_size_t(i)).contents
            for i in range(self._library.emulated_attribute_count())
        ]
        return [(record.kernel.decode(), record.device, record.value) for record in records]

    def _error_string(self, code):
        self._library.emulated_error_string.restype = ctypes.c_void_p
        return self._library.emulated_error_string(ctypes.c_int(code))

    def _launch(self, i):
        launch = self._library.emulated_launch(ctypes.c_size_t(i)).contents
        counters = (ctypes.c_uint64 * len(ptx.counter_names())).from_address(launch.counters)
        return ptx.Launch(
            launch.kernel.decode(),
            tuple(launch.shape.grid),
            tuple(launch.shape.block),
            launch.shape.dynamic_shared,
            ptx.make_counters(counters, launch.warnings.decode()),
            launch.stream,
        )


class _Stream:
    def __repr__(self):
        return "STREAM"


STREAM = _Stream()


def _as_ctypes(value):
    if value is None:
        return ctypes.c_void_p(None)
    if isinstance(value, bool | int):
        return ctypes.c_int(value)
    if isinstance(value, float):
        return ctypes.c_double(value)
    return value
