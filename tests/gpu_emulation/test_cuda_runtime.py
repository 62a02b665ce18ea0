"""The stand-in runtime: a launcher's kernels run as on a card, and every planted bug is noticed."""

from pathlib import Path

import pytest
import torch

from tests.gpu_emulation import STREAM, CudaError, PtxError

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
        assert launch.counters.mma == 2 * 2 * 4 * 3 * 2 * 8  # blocks, warps, K steps of 32, of 16, columns of 8


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_noticed(tile_product, gpu, bug):
    if not gpu.emulated:
        pytest.skip("a card does not notice")
    with pytest.raises(PtxError, match=f"(?i){BUGS[bug]}"):
        tile_product(bug)


def test_launchers_own_error_is_raised(tile_product):
    with pytest.raises(CudaError, match="tile_product_launch returned 1"):
        tile_product(99)
