"""The stand-in runtime: a launcher's kernels run as on a card, and every planted bug is noticed."""

import ctypes
from pathlib import Path

import pytest
import torch

from tests.gpu_emulation import STREAM, BuildError, CudaError, EmulatedCudaLibrary, PtxError, build

KERNELS = Path(__file__).parent / "kernels"
M, N, K = 100, 77, 72
# Number of the bug in kernels/tile_product.cuh, and what the emulator must say.
BUGS = {
    1: "out of bounds",
    2: "cp.async still in flight",
    3: "race|uninitialised",
    4: "race|in flight",
    5: "never arrive|deadlock",
    6: "race",
    7: "barrier|deadlock",
}


@pytest.fixture
def tile_product(gpu, nvcc):
    library = gpu.cuda_library([KERNELS / "tile_product.cu"])
    generator = torch.Generator().manual_seed(0)
    a = (torch.randn(M, K, generator=generator) * 0.3).bfloat16().to(gpu.device)
    b = (torch.randn(N, K, generator=generator) * 0.3).bfloat16().to(gpu.device)

    def run(bug=0, **options):
        c = torch.full((M, N), torch.nan, device=gpu.device)
        rowsum = torch.zeros(M, device=gpu.device)
        arguments = (a, b, c, rowsum, M, N, K, 0.5, bug, STREAM)
        launches = library.call("tile_product_launch", *arguments, read_only=(0, 1), **options)
        return c, rowsum, a.double() @ b.double().T * 0.5, launches

    return run


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_clean_kernel_is_right(tile_product, gpu, seed):
    c, rowsum, truth, launches = tile_product(seed=seed, warp_races=bool(seed))
    torch.testing.assert_close(c.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rowsum.double(), truth.exp().sum(1), rtol=1e-5, atol=1e-5)
    if gpu.emulated:
        (launch,) = launches
        assert launch.grid == (2, 2, 1) and launch.block == (128, 1, 1)
        assert (
            launch.counters.mma == 2 * 2 * 4 * 3 * 2 * 8
        )  # blocks, warps, K steps of 32, of 16, columns of 8


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_noticed(tile_product, gpu, bug):
    if not gpu.emulated:
        pytest.skip("a card does not notice")
    with pytest.raises(PtxError, match=f"(?i){BUGS[bug]}"):
        tile_product(bug)


def test_launchers_own_error_is_raised(tile_product):
    with pytest.raises(CudaError, match="tile_product_launch returned 1"):
        tile_product(99)


@pytest.fixture
def runtime_calls(gpu, nvcc):
    if not gpu.emulated:
        pytest.skip("tests the stand-in")
    return gpu.cuda_library([KERNELS / "runtime_calls.cu"])


def test_launch_on_the_given_stream_with_dynamic_shared_memory(runtime_calls):
    x = torch.zeros(2, 64)
    (launch,) = runtime_calls.call("reverse_launch", x, 64, 100 * 1024, STREAM, stream=0x1234)
    assert launch.stream == 0x1234 and launch.shared == 100 * 1024 and launch.grid == (2, 1, 1)
    assert (x == torch.arange(63, -1, -1)).all()


def test_dynamic_shared_memory_needs_the_attribute(runtime_calls):
    x = torch.zeros(2, 64)
    with pytest.raises(CudaError, match="invalid argument"):
        runtime_calls.call("reverse_launch_without_attribute", x, 64, 100 * 1024, STREAM)
    with pytest.raises(CudaError, match="invalid argument"):
        runtime_calls.call("reverse_launch", x, 64, 300 * 1024, STREAM)


def test_settings_of_shared_memory_are_told_and_belong_to_a_device(runtime_calls):
    x = torch.zeros(2, 64)
    arguments = (x, 64, 100 * 1024, STREAM)
    runtime_calls.call("reverse_launch", *arguments, device=3)
    (allowed, again) = runtime_calls.shared_limits()
    assert "reverse" in allowed[0] and allowed[1:] == (3, 100 * 1024) and again[1:] == (3, 0)
    runtime_calls.call("allow_shared", 100 * 1024, device=3)
    runtime_calls.call("reverse_launch_without_attribute", *arguments, device=3)
    assert not runtime_calls.shared_limits()
    with pytest.raises(CudaError, match="invalid argument"):
        runtime_calls.call("reverse_launch_without_attribute", *arguments, device=4)


def test_kernels_need_not_run(runtime_calls):
    x = torch.zeros(2, 64)
    (launch,) = runtime_calls.call("reverse_launch", x, 64, 1024, STREAM, executes=False)
    assert launch.grid == (2, 1, 1) and launch.counters.instructions == 0 and not x.any()


@pytest.mark.parametrize(
    "y, z, fits", [(65535, 65535, True), (65536, 1, False), (1, 65536, False), (0, 1, False)]
)
def test_grids_that_no_card_takes_are_refused(runtime_calls, y, z, fits):
    arguments = (torch.zeros(1), 2**31 - 1, y, z, STREAM)
    if fits:
        (launch,) = runtime_calls.call("grid_launch", *arguments, executes=False)
        assert launch.grid == (2**31 - 1, y, z)
    else:
        with pytest.raises(CudaError, match="invalid configuration"):
            runtime_calls.call("grid_launch", *arguments, executes=False)


def test_device_attributes(runtime_calls, gpu):
    found = torch.zeros(5, dtype=torch.int32)
    runtime_calls.call("device_attributes", found)
    major_minor, multiprocessors, shared = {80: (80, 108, 166912), 90: (90, 132, 232448)}[gpu.arch]
    assert found.tolist() == [major_minor, multiprocessors, shared, 32, 2048 // 64]


def test_multiprocessors_can_be_chosen(gpu, nvcc):
    if not gpu.emulated:
        pytest.skip("tests the stand-in")
    library = gpu.cuda_library([KERNELS / "runtime_calls.cu"], multiprocessors=7)
    found = torch.zeros(5, dtype=torch.int32)
    library.call("device_attributes", found)
    assert found[1] == 7


def test_unknown_attribute_is_refused(runtime_calls):
    with pytest.raises(PtxError, match="cudaDeviceGetAttribute: attribute 1000 is unknown"):
        runtime_calls.call("unknown_attribute")


def test_allocation_is_poisoned_and_bounded(runtime_calls):
    x = torch.zeros(4)
    runtime_calls.call("copy_from_scratch", x, 4, STREAM)
    assert x.isnan().all()
    with pytest.raises(PtxError, match="out of bounds: nearest is cudaMalloc"):
        runtime_calls.call("copy_from_scratch", torch.zeros(5), 5, STREAM)


def test_capture_forbids_waiting_and_allocating(runtime_calls):
    x = torch.zeros(4)
    runtime_calls.call("synchronize", STREAM)
    with pytest.raises(CudaError, match="not permitted when stream is capturing"):
        runtime_calls.call("synchronize", STREAM, capturing=True)
    with pytest.raises(CudaError, match="not permitted when stream is capturing"):
        runtime_calls.call("copy_from_scratch", x, 4, STREAM, capturing=True)


def test_memset_outside_all_buffers_is_noticed(runtime_calls):
    x = torch.ones(4)
    runtime_calls.call("clear", x, 16, STREAM)
    assert (x == 0).all()
    with pytest.raises(PtxError, match="cudaMemsetAsync of 20 bytes reaches outside"):
        runtime_calls.call("clear", x, 20, STREAM)


def test_structures_and_named_buffers(runtime_calls):
    class Args(ctypes.Structure):
        _fields_ = [("x", ctypes.c_void_p), ("n", ctypes.c_int64), ("value", ctypes.c_float)]

    x = torch.zeros(10)
    args = Args(x.data_ptr(), 10, 2.5)
    runtime_calls.call("fill_launch", ctypes.byref(args), STREAM, buffers={"x": x})
    assert (x == 2.5).all()
    with pytest.raises(PtxError, match="write to read-only buffer x"):
        runtime_calls.call("fill_launch", ctypes.byref(args), STREAM, buffers={"x": x}, read_only={"x"})
    with pytest.raises(PtxError, match="out of bounds"):
        runtime_calls.call("fill_launch", ctypes.byref(args), STREAM, buffers={"x": x[:9]})


def test_unknown_runtime_call_fails_the_link(nvcc, tmp_path):
    source = tmp_path / "unknown.cu"
    source.write_text('#include <cuda_runtime.h>\nextern "C" int reset() { return cudaDeviceReset(); }\n')
    with pytest.raises(BuildError, match="cudaDeviceReset"):
        EmulatedCudaLibrary([source], 80)


def test_a_closed_library_is_unloaded(nvcc, tmp_path):
    """Hundreds of mutated kernels come and go in one process. The static keeps a library where g++ makes it unique."""
    source = tmp_path / "closed.cu"
    source.write_text(
        "inline int &calls() { static int count = 0; return count; }\n"
        'extern "C" int closed_launch() { return calls()++; }\n'
    )

    def is_loaded():
        return str(path.resolve()) in Path("/proc/self/maps").read_text()

    path = build.emulated_cuda_library([source], 80)
    for _ in range(2):  # the second library does not see the first one's static
        library = EmulatedCudaLibrary([source], 80)
        assert is_loaded()
        assert library.call("closed_launch") == []
        library.close()
        assert not is_loaded()
