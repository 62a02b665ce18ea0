"""The CUDA kernel of `momentum_update_`, as nvcc compiled it, against the average in float64."""

import ctypes
import itertools
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.cuda.launching import DTYPE_CODES
from tests.cuda.test_machine_code import REGISTERS, cuobjdump, instructions, make_cubin, resource_report
from tests.gpu_emulation import STREAM
from tests.support import momentum_update as support

__all__ = ["cuobjdump"]
SOURCE = "momentum_update.cu"
ROOT = Path(__file__).resolve().parents[2]
CHUNK, MAX_TENSORS = 4096, 100
HALF = (torch.float16, torch.bfloat16)


class Triple(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("master", "shadow", "source")],
        ("count", ctypes.c_int64),
        *[(name, ctypes.c_int32) for name in ("shadow_dtype", "source_dtype")],
    ]


def triple(count, shadow_dtype, source_dtype, device, *, offset=0, seed=0):
    """Master, shadow and source of `count` elements, `offset` elements into their memory."""
    generator = torch.Generator().manual_seed(seed)
    master, source = (torch.randn(count + offset, generator=generator)[offset:] for _ in range(2))
    parts = [master, master.to(shadow_dtype), source.to(source_dtype)]
    return [
        torch.zeros(count + offset, dtype=part.dtype, device=device)[offset:].copy_(part) for part in parts
    ]


def update(library, triples, momentum, **options):
    structures = (Triple * max(len(triples), 1))()
    weight = torch.tensor(
        1 - momentum, dtype=torch.float32, device=triples[0][0].device if triples else "cpu"
    )
    buffers = {"weight": weight}
    for i, (master, shadow, source) in enumerate(triples):
        structures[i] = Triple(
            *[tensor.data_ptr() for tensor in (master, shadow, source)],
            master.numel(),
            DTYPE_CODES[shadow.dtype],
            DTYPE_CODES[source.dtype],
        )
        parts = {f"master{i}": master, f"shadow{i}": shadow, f"source{i}": source}
        buffers |= {name: tensor for name, tensor in parts.items() if tensor.numel()}
    return library.call(
        "momentum_update",
        ctypes.byref(structures),
        ctypes.c_int64(len(triples)),
        weight,
        STREAM,
        buffers=buffers,
        read_only={name for name in buffers if name.startswith(("source", "weight"))},
        **options,
    )


def check(library, triples, momentum, **options):
    parts = zip(*triples, strict=True)
    return support.check(lambda: update(library, triples, momentum, **options), *parts, momentum)


@pytest.mark.parametrize("shadow, source", list(itertools.product(HALF, (torch.float32, *HALF))), ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.4, 0.5, 0.999, 1.0])
def test_any_dtypes_and_momentum(library, gpu, shadow, source, momentum):
    check(library, [triple(300, shadow, source, gpu.device)], momentum)


@pytest.mark.parametrize("count", [1, 3, 4, 255, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_any_length_and_alignment(library, gpu, count, offset):
    check(library, [triple(count, torch.bfloat16, torch.float32, gpu.device, offset=offset)], 0.9)


def test_what_was_written_into_a_shadow_and_nan(library, gpu):
    master, shadow, source = triple(CHUNK + 9, torch.float16, torch.float16, gpu.device)
    shadow[::5] = 3.0
    source[7] = master[11] = torch.nan
    check(library, [(master, shadow, source)], 0.75)
    assert master[7].isnan() and not master[11].isnan()  # its shadow is the average


def test_many_tensors_take_a_launch_for_a_hundred_of_a_kind(library, gpu):
    dtypes = [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ]
    kinds = [dtypes[0]] * (2 * MAX_TENSORS + 1) + [dtypes[1], dtypes[2]]
    triples = [triple((37 * i) % 50, *kind, gpu.device, seed=i) for i, kind in enumerate(kinds)]
    triples[3] = triple(2 * CHUNK + 1, *dtypes[0], gpu.device)
    launches = check(library, triples, 0.99)
    full = sum(master.numel() > 0 for master, shadow, source in triples[: len(kinds) - 2])
    assert gpu.emulated <= (len(launches or ()) == -(-full // MAX_TENSORS) + 2)
    assert not update(library, [], 0.9)


def test_every_schedule_gives_the_same_bits_and_can_be_captured(library, gpu):
    results = []
    for options in ({}, {"seed": 1, "warp_races": True}, {"seed": 2, "warp_races": True}):
        triples = [triple(n, torch.bfloat16, torch.float32, gpu.device) for n in (5, CHUNK + 3)]
        if gpu.emulated:
            options = {**options, "capturing": True, "stream": 7}
        launches = check(library, triples, 0.99, **options)
        results.append(triples[1][0])
        assert {launch.stream for launch in launches} <= {7}
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_moves_what_its_header_says(library, gpu, source):
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    (launch,) = check(library, [triple(2 * CHUNK, torch.bfloat16, source, gpu.device)], 0.99)
    warps = launch.grid[0] * launch.block[0] // 32  # each reads the weight
    assert launch.counters.global_load_sectors == 2 * CHUNK * (4 + 2 + source.itemsize) // 32 + warps
    assert launch.counters.global_store_sectors == 2 * CHUNK * (4 + 2) // 32


@pytest.mark.parametrize("arch", [80, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (90, 100))])
def test_machine_code_has_no_spills_and_wide_accesses(cuobjdump, nvcc, tmp_path, arch):
    cubin = make_cubin("momentum_update", arch, tmp_path)
    report, code = (
        read(
            subprocess.run([cuobjdump, what, cubin], capture_output=True, text=True, check=True).stdout,
            lambda kernel: "momentum_update_kernel" in kernel,
        )
        for read, what in ((resource_report, "--dump-resource-usage"), (instructions, "-sass"))
    )
    assert len(report) == len(code) == 6
    for name, usage in report.items():
        assert usage["STACK"] == usage["LOCAL"] == 0, name
        assert -(-usage["REG"] * 32 // 256) * 256 * 8 * 3 <= REGISTERS, (
            f"{name} uses {usage['REG']} registers"
        )
        for access in (r"LDG\.E\S*\.128", r"STG\.E\S*\.128", r"LDG\.E\S*\.64", r"STG\.E\S*\.64"):
            assert sum(count for opcode, count in code[name].items() if re.match(access, opcode)) >= 4, access
