"""What the emulator counted against what the kernels' headers state."""

import pytest
import torch
import triton

from ssl_kernels.triton import panels
from ssl_kernels.triton.launch import find_tile
from ssl_kernels.triton.panels import wide_product
from ssl_kernels.triton.sigmoid_pairs import sigmoid_pairs_fwd
from tests.support.sigmoid_pairs import random_call as random_pairs
from tests.triton.contrastive_calls import case, forward, run


def _launches(gpu, case):
    call = case.call(gpu.device)
    with gpu.triton() as launches:
        run(call, case.expectation)
    _needs_counters(gpu)
    return {launch.kernel: launch.counters for launch in launches}


def _forward_and_splits(gpu, case):
    call = case.call(gpu.device)
    with gpu.triton() as launches:
        forward(call)
    _needs_counters(gpu)
    (launch,) = (launch for launch in launches if launch.kernel == "contrastive_fwd_kernel")
    return launch.counters, launch.grid[1]


def _needs_counters(gpu):
    if not gpu.emulated:
        pytest.skip("a card has no counters to give")


def _padded(size, block):
    return -(-size // block) * block


@pytest.mark.parametrize("n, d", [(300, 64), (256, 128)])
def test_square_case_multiplies_one_unit_forward_and_two_backward(gpu, n, d):
    counters = _launches(gpu, case(n, None, d, torch.bfloat16))
    for kernel, stem, units in (("forward", "fwd", 1), ("backward", "bwd", 2)):
        tile = find_tile(kernel, gpu.arch, "half", d)
        flops = _padded(n, tile.block_n) * _padded(n, tile.block_m) * d
        counted = counters[f"contrastive_{stem}_kernel"].mma
        if gpu.arch == 80:
            assert counted == units * flops // (16 * 8 * 16)
        else:
            # wgmma: one instruction of 64 × block × 16 a warpgroup of 4 warps, counted for each warp.
            first = flops // (64 * tile.block_m * 16) * 4
            second = flops // (64 * d * 16) * 4 if units == 2 else 0
            assert counted == first + second


def test_expectation_multiplies_two_units(gpu):
    n, m, d = 256, 512, 128
    counters = _launches(gpu, case(n, m, d, torch.bfloat16, expectation=True))
    tile = find_tile("expectation", gpu.arch, "half", d)
    flops = _padded(n, tile.block_n) * _padded(m, tile.block_m) * d
    if gpu.arch == 80:
        stated = 2 * flops // (16 * 8 * 16)
    else:
        stated = flops // (64 * tile.block_m * 16) * 4 + flops // (64 * d * 16) * 4
    assert counters["contrastive_fwd_kernel"].mma == stated


def test_both_directions_multiply_one_unit_forward(gpu):
    """Each tile is visited once; its column sums are 8 bytes per column and row block."""
    n, m, d = 256, 512, 128
    counters, splits = _forward_and_splits(
        gpu, case(n, m, d, torch.bfloat16, both_directions=True, positives=0)
    )
    tile = find_tile("forward", gpu.arch, "half", d)
    flops = _padded(n, tile.block_n) * _padded(m, tile.block_m) * d
    assert counters.mma == flops // (16 * 8 * 16 if gpu.arch == 80 else 64 * tile.block_m * 16 // 4)
    assert counters.global_store_sectors * 32 == 8 * n * splits + 8 * m * -(-n // tile.block_n)


@pytest.mark.parametrize("operation", ["contrastive", "sigmoid"])
def test_wide_rows_multiply_one_unit_and_leave_the_rest_to_torch(gpu, operation, monkeypatch):
    """Both gradients come from one set of coefficients: a unit of ours, and two of torch's matrix product."""
    n, m, d = 192, 256, 320
    multiplied = []

    def counting(a, b, *rest):
        multiplied.append((*a.shape, b.shape[1]))
        return wide_product(a, b, *rest)

    monkeypatch.setattr(panels, "wide_product", counting)
    if operation == "contrastive":
        counters = _launches(gpu, case(n, m, d, torch.bfloat16, both_directions=True))
    else:
        call = random_pairs(n, m, d, torch.bfloat16, device=gpu.device)
        with gpu.triton() as launches:
            sigmoid_pairs_fwd(*call.operands, True, True, True, True)
        _needs_counters(gpu)
        counters = {launch.kernel: launch.counters for launch in launches}
    tile = find_tile("coefficient", gpu.arch, "half", d)
    flops = _padded(n, tile.block_n) * _padded(m, tile.block_m) * _padded(d, tile.block_d)
    per_instruction = 16 * 8 * 16 if gpu.arch == 80 else 64 * tile.block_m * 16 // 4
    assert counters[f"{operation}_coefficient_kernel"].mma == flops // per_instruction
    assert multiplied == [(n, m, d), (m, n, d)]


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
def test_forward_traffic_is_as_stated(gpu, normalize):
    n, d = 512, 64
    counters, splits = _forward_and_splits(
        gpu, case(n, None, d, torch.bfloat16, normalize=normalize, positives=0)
    )
    tile = find_tile("forward", gpu.arch, "half", d)
    blocks = n // tile.block_n
    stated = 2 * n * d * (splits + blocks)
    if normalize:
        stated += 4 * blocks * n * tile.num_warps * (2 if gpu.arch == 90 else 1)
    assert 1.0 <= counters.global_load_sectors * 32 / stated < 1.1
    assert counters.global_store_sectors * 32 == 8 * n * splits


@pytest.mark.parametrize("normalize", [False, True], ids=["raw", "normalized"])
def test_backward_traffic_is_as_stated(gpu, normalize):
    n, d = 512, 64
    call = case(n, None, d, torch.bfloat16, normalize=normalize).call(gpu.device)
    with gpu.triton() as launches:
        run(call)
    _needs_counters(gpu)
    (launch,) = (launch for launch in launches if launch.kernel == "contrastive_bwd_kernel")
    blocks, splits = launch.grid[:2]
    # Triton 3.6 copies what belongs to a column asynchronously, by twice the threads that it takes.
    terms = (5 if normalize else 4) * (2 if triton.__version__.startswith("3.6.") else 1)
    stated = 2 * n * d * (splits + blocks) + 4 * blocks * n * terms
    assert 1.0 <= launch.counters.global_load_sectors * 32 / stated < 1.1
    assert launch.counters.global_store_sectors * 32 == 4 * splits * n * d


@pytest.mark.parametrize("d", [64, 320], ids=["narrow", "wide"])
@pytest.mark.parametrize("m", [None, 128], ids=["square", "both directions"])
def test_exponentials_and_instructions_of_an_entry(gpu, m, d):
    """One exponential for both sides' sums, forward and backward, down to a temperature of 0.046; two below.

    Those of the sums as they grow and meet come on top, up to 0.3 an entry of so small a matrix.
    """
    both = m is not None
    backward = "bwd" if d == 64 else "coefficient"
    above, below = (
        _launches(gpu, case(128, m, d, torch.bfloat16, both_directions=both, temperature=temperature))
        for temperature in (0.046, 0.044)
    )
    for counters, expected in ((above, 1), (below, 2)):
        for stem, exponentials in (("fwd", expected if both else 1), (backward, expected)):
            counted = counters[f"contrastive_{stem}_kernel"].special_functions / 128**2
            assert exponentials <= counted <= exponentials + 0.3, stem
    for stem in ["fwd"] * both + [backward]:
        counted = [counters[f"contrastive_{stem}_kernel"].thread_instructions for counters in (above, below)]
        assert counted[0] < 0.95 * counted[1], stem
