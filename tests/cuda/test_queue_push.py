"""CUDA kernels of `queue_push_`, as nvcc compiled them, against a ring in Python."""

import itertools
import subprocess

import pytest
import torch

from tests.cuda.queue_push_calls import ring_on
from tests.cuda.test_machine_code import ARCHITECTURES, REGISTERS, cuobjdump, make_cubin, resource_report
from tests.support.queue_push import keys_of

__all__ = ["cuobjdump"]
SOURCE = "queue_push.cu"
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("storage, key", list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_any_dtypes(library, gpu, storage, key):
    ring = ring_on(library, 7, 12, storage, gpu.device)
    for step, count in enumerate((3, 5, 1)):
        ring.push(keys_of(count, 12, key, gpu.device, step), True)
    ring.check()
    ring.push(keys_of(6, 12, key, gpu.device, 9), False)
    ring.check()


@pytest.mark.parametrize("size, count", [(1, 1), (1, 3), (5, 2), (5, 5), (5, 13), (100, 33), (10, 25)])
def test_any_size_and_batch(library, gpu, size, count):
    ring = ring_on(library, size, 5, torch.float32, gpu.device)
    for step in range(4):
        ring.push(keys_of(count, 5, torch.float32, gpu.device, step), False)
        ring.check()


@pytest.mark.parametrize("width", [1, 3, 4, 123, 128, 260])
def test_any_width(library, gpu, width):
    ring = ring_on(library, 9, width, torch.bfloat16, gpu.device, position=7, filled=9)
    ring.push(keys_of(4, width, torch.float32, gpu.device), True)
    ring.check()


def test_strides(library, gpu):
    """Transposed keys, keys at an odd offset, with gaps, one key repeated."""
    ring = ring_on(library, 40, 24, torch.float16, gpu.device)
    keys = keys_of(10, 24, torch.float16, gpu.device)
    inside = torch.zeros(10, 31, dtype=torch.float16, device=gpu.device)[:, 5:29].copy_(keys)
    apart = torch.zeros(10, 48, dtype=torch.float16, device=gpu.device)[:, ::2].copy_(keys)
    for view in (keys.T.contiguous().T, inside, apart, keys[:1].expand(3, 24), keys[::3]):
        ring.push(view, True)
    ring.check()


def test_zero_tiny_and_nan_keys(library, gpu):
    ring = ring_on(library, 4, 8, torch.float32, gpu.device)
    keys = keys_of(4, 8, torch.float32, gpu.device)
    keys[0] = 0
    keys[1] = 3e-13  # shorter than the smallest norm
    keys[2, 3] = torch.nan
    ring.push(keys, True)
    ring.check()


def test_no_keys_change_nothing(library, gpu):
    ring = ring_on(library, 4, 8, torch.float32, gpu.device, position=3, filled=3)
    assert not ring.push(torch.zeros(0, 8, device=gpu.device), True)
    ring.check()


@pytest.mark.parametrize("position", [-3, 4, 2**62])
def test_a_position_and_a_fill_count_out_of_range(library, gpu, position):
    ring = ring_on(library, 4, 8, torch.float32, gpu.device, position=position, filled=-5)
    ring.push(keys_of(3, 8, torch.float32, gpu.device), False)
    ring.check()


def test_every_schedule_gives_the_same_bits_and_can_be_captured(library, gpu):
    results = []
    for options in ({}, {"seed": 1, "warp_races": True}, {"seed": 2, "warp_races": True}):
        ring = ring_on(library, 20, 24, torch.bfloat16, gpu.device, position=15)
        if gpu.emulated:
            options = {**options, "capturing": True, "stream": 7}
        launches = ring.push(keys_of(60, 24, torch.float32, gpu.device), True, **options)
        ring.check()
        results.append(ring.storage)
        assert {launch.stream for launch in launches} <= {7}
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("normalize", [False, True])
def test_kernel_moves_what_its_header_says(library, gpu, normalize):
    """Normalised keys are read twice, the second time from cache, which the counter does not tell from memory."""
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    ring = ring_on(library, 100, 128, torch.bfloat16, gpu.device, position=90)
    push, advance = ring.push(keys_of(64, 128, torch.float32, gpu.device), normalize)
    assert push.counters.global_load_sectors == (2 if normalize else 1) * 64 * 128 * 4 // 32 + 64
    assert push.shared == 0
    assert push.counters.global_store_sectors == 64 * 128 * 2 // 32
    assert advance.counters.global_store_sectors <= 2 and advance.block == (1, 1, 1)


@pytest.mark.parametrize(
    "arch", [pytest.param(arch, marks=[] if arch == 90 else pytest.mark.slow) for arch in ARCHITECTURES]
)
def test_no_spills_and_four_blocks_a_multiprocessor(cuobjdump, nvcc, tmp_path, arch):
    cubin = make_cubin("queue_push", arch, tmp_path)
    usage = subprocess.run(
        [cuobjdump, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    report = resource_report(usage, lambda name: "queue_push_kernel" in name)
    assert len(report) == 16
    for name, needs in report.items():
        assert needs["STACK"] == needs["LOCAL"] == needs["SHARED"] == 0, name
        assert -(-needs["REG"] * 32 // 256) * 256 * 8 * 4 <= REGISTERS, (
            f"{name} uses {needs['REG']} registers"
        )
