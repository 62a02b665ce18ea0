"""Triton's compiled code runs on CPU tensors through Triton's own launch path."""

import pytest
import torch
import triton
import triton.language as tl

from tests.gpu_emulation import PtxError, emulated_triton
from tests.gpu_emulation.kernels.attention import softmax_product
from tests.gpu_emulation.kernels.row_lse import row_lse


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_compiled_kernel_is_right(gpu, dtype, seed):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 48, generator=generator) for n in (130, 77))
    x, y = (torch.nn.functional.normalize(t, dim=1).to(gpu.device, dtype) for t in (x, y))
    truth = torch.logsumexp(x.double() @ y.double().T * 10, 1)
    with gpu.triton(seed=seed) as launches:
        lse, total, counts = row_lse(x, y)
    torch.testing.assert_close(lse.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total.double(), truth.sum(0, keepdim=True), rtol=1e-5, atol=1e-5)
    assert counts.tolist() == [33, 33, 32, 32]
    if gpu.emulated:
        (launch,) = launches
        assert launch.kernel == "row_lse_kernel" and launch.grid == (3, 1, 1)
        assert (launch.counters.mma > 0) == (dtype != torch.float32)


def test_tf32_uses_the_tensor_cores(gpu):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 64, generator=generator).to(gpu.device) for n in (64, 64))
    with gpu.triton() as launches:
        lse, _, _ = row_lse(x, y, scale=0.1, precision="tf32")
    truth = torch.logsumexp(x.double() @ y.double().T * 0.1, 1)
    torch.testing.assert_close(lse.double(), truth, rtol=2e-3, atol=2e-3)
    if gpu.emulated:
        assert launches[0].counters.mma > 0


@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_chained_products(gpu, dtype, width):
    """wgmma on sm_90: every swizzle, A from shared memory and from registers, B straight and transposed."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, width, generator=generator).to(gpu.device, dtype) for n in (64, 128))
    with gpu.triton() as launches:
        out = softmax_product(x, y, 0.1)
    p = (x.double() @ y.double().T * 0.1).exp()
    torch.testing.assert_close(out.double(), p @ y.double() / p.sum(1, keepdim=True), rtol=2e-2, atol=5e-3)
    if gpu.emulated:
        counters = launches[0].counters
        assert counters.mma_flops == 2 * 2 * 64 * 128 * width
        flops_of_one = counters.mma_flops / counters.mma
        assert flops_of_one == 2 * 16 * 8 * 16 if gpu.arch == 80 else flops_of_one > 2 * 16 * 8 * 16


def test_autotuning_compares_instructions(gpu):
    if not gpu.emulated:
        pytest.skip("a card measures time")
    x, y = torch.arange(512.0), torch.zeros(512)
    _tuned_copy.cache.clear()  # its key does not name the architecture
    with gpu.triton() as launches:
        _tuned_copy[lambda meta: (triton.cdiv(512, meta["BLOCK"]),)](x, y, 512)
    assert (x == y).all()
    assert len({launch.grid for launch in launches}) == 2
    best = min(launches, key=lambda launch: launch.counters.instructions)
    assert launches[-1].grid == best.grid


@triton.autotune(
    [triton.Config({"BLOCK": 32}, num_warps=1), triton.Config({"BLOCK": 128}, num_warps=1)], key=["n"]
)
@triton.jit
def _tuned_copy(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i, mask=i < n), mask=i < n)


@triton.jit
def _scalars(out_ptr, a, b, c, flag, NAME: tl.constexpr):
    tl.store(out_ptr, a + b + c.to(tl.float64))
    if flag:
        tl.store(out_ptr + 1, NAME)


def test_scalar_arguments(gpu):
    out = torch.zeros(2, dtype=torch.float64, device=gpu.device)
    with gpu.triton():
        _scalars[(1,)](out, 3, 2**40, 0.5, True, NAME=7)
    assert out.tolist() == [3 + 2**40 + 0.5, 7.0]


@triton.jit
def _unmasked_copy(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i))


@pytest.mark.parametrize("arch", [80, 90])
def test_missing_mask_is_noticed(arch):
    x, y = torch.ones(100), torch.empty(128)
    with emulated_triton(arch), pytest.raises(PtxError, match="out of bounds"):
        _unmasked_copy[(1,)](x, y, BLOCK=128)


@pytest.mark.parametrize("grid", [(0,), (1, 65536), (1, 1, 65536), (2**31,)], ids=str)
def test_grids_that_no_card_takes_are_refused(grid):
    for executes in (True, False):
        with emulated_triton(80, executes), pytest.raises(PtxError, match="a grid must be within"):
            _unmasked_copy[grid](torch.ones(128), torch.empty(128), BLOCK=128)


def test_kernels_need_not_run_and_tensors_need_no_memory():
    y = torch.zeros(128)
    with emulated_triton(80, executes=False) as launches:
        _unmasked_copy[(2**31 - 1, 65535)](torch.empty(2**40, device="meta"), y, BLOCK=128)
    assert not y.any() and launches[0].grid == (2**31 - 1, 65535, 1)


def test_driver_is_restored():
    from triton.runtime import driver

    before = driver._active
    with emulated_triton(80):
        assert driver._active is not before
    assert driver._active is before


def test_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), emulated_triton(80):
        pass


def test_untested_version_is_refused(monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.0.0")
    with pytest.raises(RuntimeError, match=r"this is 3.0.0"), emulated_triton(80):
        pass
