"""The emulator from Python: PTX text in, kernels run on numpy arrays or torch CPU tensors."""

import ctypes
import dataclasses
import functools

import numpy as np

from . import build

# Of every card that runs sm_80 to sm_100. Source: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability".
GRID_LIMITS = (2**31 - 1, 65535, 65535)


class PtxError(RuntimeError):
    """PTX the emulator cannot run, or a fault that it noticed in a kernel; says where."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to check and how to schedule.

    bounds: global accesses must lie inside a buffer passed to the launch.
    races: two threads touching the same byte, one writing, with nothing that orders them, is an error.
    grid_races: as races, between blocks.
    warp_races: as races, between lanes of one warp that no __syncwarp or collective orders.
    uninitialized: shared memory must be written before it is read.
    seed: 0 runs blocks and warps in order; any other number is a random schedule, the same each time.
    instruction_limit: warp instructions after which a launch is taken for an endless loop.
    """

    bounds: bool = True
    races: bool = True
    grid_races: bool = True
    warp_races: bool = False
    uninitialized: bool = True
    seed: int = 0
    instruction_limit: int = 2_000_000_000


@dataclasses.dataclass(frozen=True)
class Counters:
    """What one launch did. A warp instruction counts once, a thread instruction for each lane that ran it.

    A request is a warp-wide memory instruction, a sector 32 bytes of global memory it touches, a wavefront
    one pass over the 32 banks of shared memory; `shared_wavefronts_ideal` is what the same words need without
    bank conflicts. Reads by cp.async count as global loads. mma counts tensor-core instructions, mma_flops
    their 2*m*n*k, fma_flops two for each lane of fma.f32 and fma.f64, special_functions the lanes of approximate
    quotients, reciprocals, roots, exponentials, logarithms, sines and tangents of float.
    """

    instructions: int = 0
    thread_instructions: int = 0
    divergent_instructions: int = 0
    mma: int = 0
    mma_flops: int = 0
    fma_flops: int = 0
    special_functions: int = 0
    global_load_requests: int = 0
    global_load_sectors: int = 0
    global_load_bytes: int = 0
    global_store_requests: int = 0
    global_store_sectors: int = 0
    global_store_bytes: int = 0
    shared_requests: int = 0
    shared_wavefronts: int = 0
    shared_wavefronts_ideal: int = 0
    barriers: int = 0
    atomics: int = 0
    async_copies: int = 0
    warnings: tuple[str, ...] = ()

    def __add__(self, other):
        return Counters(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch: mangled name, shape, dynamic shared memory in bytes, counters, stream handle."""

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    counters: Counters
    stream: int = 0


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a module: static shared and local bytes, number of instructions, those it cannot run."""

    parameters: int
    shared: int
    local: int
    instructions: int
    unsupported: tuple[str, ...]


class Region(ctypes.Structure):
    _fields_ = [
        ("address", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
        ("read_only", ctypes.c_int32),
    ]


class NativeOptions(ctypes.Structure):
    _fields_ = [
        ("bounds", ctypes.c_int32),
        ("races", ctypes.c_int32),
        ("grid_races", ctypes.c_int32),
        ("warp_races", ctypes.c_int32),
        ("uninitialized", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("instruction_limit", ctypes.c_uint64),
    ]


class LaunchShape(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared", ctypes.c_uint64),
    ]


class Module:
    """A parsed PTX module.

    Args:
        ptx: The text, as nvcc or Triton emits it for sm_80 or sm_90.

    Raises:
        PtxError: The text cannot be parsed.
    """

    def __init__(self, ptx):
        self._library = emulator()
        message = ctypes.create_string_buffer(4000)
        self._handle = self._library.ptx_load(ptx.encode(), message, len(message))
        if not self._handle:
            raise PtxError(message.value.decode())
        self.kernels = {}
        for line in self._library.ptx_kernels(self._handle).decode().splitlines():
            name, *numbers, unsupported = line.split("\t")
            self.kernels[name] = Kernel(*map(int, numbers), tuple(filter(None, unsupported.split(";"))))

    def __del__(self):
        if getattr(self, "_handle", None):
            self._library.ptx_free(self._handle)

    def launch(self, name, grid, block, args, *, shared=0, read_only=(), buffers=None, **options):
        """Runs kernel `name` to its end.

        Args:
            name: Its name in the PTX text.
            grid, block: One to three sizes.
            args: One value a parameter: arrays and tensors pass their address and become buffers it may
                touch, ctypes values (`ctypes.c_int32(3)`) pass as they are.
            shared: Dynamic shared memory in bytes.
            read_only: Indices of args the kernel must not write.
            buffers: Further arrays or tensors it may touch, by name.
            options: Fields of `Options`.

        Returns:
            Counters of the launch.

        Raises:
            PtxError: Something the emulator noticed, or cannot run.
        """
        if name not in self.kernels:
            raise PtxError(f"no kernel {name}, the module has {sorted(self.kernels)}")
        if len(args) != self.kernels[name].parameters:
            raise PtxError(f"{name} takes {self.kernels[name].parameters} parameters, got {len(args)}")
        check_grid(name, grid)
        values, regions = [], []
        for i, arg in enumerate(args):
            if is_buffer(arg):
                regions.append(region(f"argument {i}", arg, i in read_only))
                values.append(ctypes.c_uint64(regions[-1].address))
            else:
                values.append(arg)
        regions += [region(label, buffer, False) for label, buffer in (buffers or {}).items()]
        pointers = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(value) for value in values))
        shape = LaunchShape(_three(grid), _three(block), shared)
        counters = (ctypes.c_uint64 * len(counter_names()))()
        message = ctypes.create_string_buffer(16000)
        status = self._library.ptx_launch(
            self._handle,
            name.encode(),
            ctypes.byref(shape),
            pointers,
            region_array(regions),
            len(regions),
            ctypes.byref(native_options(Options(**options))),
            counters,
            message,
            len(message),
        )
        text = message.value.decode()
        if status:
            raise PtxError(text)
        return make_counters(counters, text)


@functools.lru_cache
def emulator():
    """The emulator's C interface (emulator/ptx.h), built at the first call."""
    library = ctypes.CDLL(str(build.emulator_library()))
    library.ptx_load.restype = ctypes.c_void_p
    library.ptx_load.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t]
    library.ptx_free.argtypes = [ctypes.c_void_p]
    library.ptx_kernels.restype = ctypes.c_char_p
    library.ptx_kernels.argtypes = [ctypes.c_void_p]
    library.ptx_counter_names.restype = ctypes.c_char_p
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    library.ptx_launch.argtypes = [
        pointer,
        text,
        pointer,
        pointer,
        pointer,
        size,
        pointer,
        pointer,
        text,
        size,
    ]
    return library


@functools.lru_cache
def counter_names():
    return emulator().ptx_counter_names().decode().split()


def make_counters(values, warnings):
    return Counters(**dict(zip(counter_names(), values, strict=True)), warnings=tuple(warnings.splitlines()))


def native_options(options):
    return NativeOptions(*(int(getattr(options, name)) for name, _ in NativeOptions._fields_))


def check_grid(name, grid):
    """Refuses a grid that no card takes."""
    sizes = (grid,) if isinstance(grid, int) else tuple(grid)
    if not all(1 <= size <= limit for size, limit in zip(sizes, GRID_LIMITS, strict=False)):
        raise PtxError(f"{name}: a grid must be within 1 to {GRID_LIMITS}, got {sizes}")


def is_buffer(value):
    return hasattr(value, "data_ptr") or isinstance(value, np.ndarray)


def region(name, buffer, read_only):
    """The bytes from the first to the last element of an array or CPU tensor of any strides."""
    if hasattr(buffer, "data_ptr"):
        if buffer.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU to be emulated, got {buffer.device}")
        address, itemsize, strides = buffer.data_ptr(), buffer.element_size(), buffer.stride()
    else:
        address, itemsize = buffer.ctypes.data, buffer.itemsize
        strides = [stride // itemsize for stride in buffer.strides]
    if any(stride < 0 for stride in strides):
        raise ValueError(f"{name} must have strides of at least 0, got {tuple(strides)}")
    last = sum((size - 1) * stride for size, stride in zip(buffer.shape, strides, strict=True))
    size = (last + 1) * itemsize if 0 not in buffer.shape else 0
    return Region(address, size, name.encode(), int(read_only))


def region_array(regions):
    return (Region * max(1, len(regions)))(*regions)


def _three(sizes):
    sizes = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return (ctypes.c_uint32 * 3)(*(*sizes, 1, 1, 1)[:3])
