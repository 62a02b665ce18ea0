"""The machine code of the mixing kernels: no spills, the promised occupancy, 16-byte accesses."""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cuda.test_machine_code import (
    ARCHITECTURES,
    REGISTERS,
    cuobjdump,
    instructions,
    make_cubin,
    resource_report,
)
from tests.gpu_emulation import nvcc_path

__all__ = ["cuobjdump"]
OPERATIONS = ("mixup", "cutmix", "mixup_normalize", "mixup_cross_entropy")

# Kernel, by what its mangled name holds: threads of a block, blocks per multiprocessor.
KERNELS = {
    "walk_order_kernel": (1024, 1),
    "mixup_edges_kernel": (128, 4),
    "mixup_walk_kernel": (128, 4),
    "mixup_grad_kernel": (128, 4),
    "mixup_grad_lam_kernel": (1024, 1),
    "cutmix_order_kernel": (1024, 1),
    "inverse_kernel": (1024, 1),
    "cutmix_walk_kernel": (128, 4),
    "cutmix_gather_kernel": (256, 2),
    "cutmix_grad_kernel": (256, 2),
    "mixup_normalize_kernel": (128, 4),
    "cross_entropy_loss_kernel": (256, 2),
    "cross_entropy_grad_kernel": (256, 2),
}
# Those that stream the batch: with 16-byte loads, 16-byte stores.
STREAMS = {
    r"mixup_walk_kernelI\w+?Li[248]E": (True, True),
    r"mixup_edges_kernelI\w+?Li[248]E": (True, True),
    r"mixup_grad_kernelI\w+?Li[248]E": (True, True),
    r"cutmix_walk_kernelI\w+?Li(2|4|8|16)E": (True, True),
    r"cutmix_gather_kernelI\w+?Li(2|4|8|16)E": (True, True),
    r"cutmix_grad_kernelI\w+?Li(2|4|8)E": (True, True),
    r"mixup_normalize_kernelI\w+?Li[48]E": (False, True),
    r"cross_entropy_loss_kernel": (True, False),
    r"cross_entropy_grad_kernel": (True, True),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(arch, marks=[] if arch == 90 else pytest.mark.slow) for arch in ARCHITECTURES],
    ids=lambda arch: f"sm_{arch}",
)
def binaries(request, cuobjdump, tmp_path_factory):
    """Files with the machine code of the operations for one architecture."""
    if nvcc_path() is None:
        pytest.skip("nvcc is not here")
    folder = tmp_path_factory.mktemp("cubins")
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(lambda operation: make_cubin(operation, request.param, folder), OPERATIONS))


def is_mixing(kernel):
    return "6mixing" in kernel


def dump(cuobjdump, files, what):
    commands = [[cuobjdump, what, file] for file in files]
    return "".join(subprocess.run(c, capture_output=True, text=True, check=True).stdout for c in commands)


def test_no_spills_and_the_promised_occupancy(cuobjdump, binaries):
    report = resource_report(dump(cuobjdump, binaries, "--dump-resource-usage"), is_mixing)
    for pattern, (threads, blocks) in KERNELS.items():
        found = {name: usage for name, usage in report.items() if pattern in name}
        assert found, f"{pattern} is missing"
        for name, usage in found.items():
            assert usage["STACK"] == usage["LOCAL"] == 0, name
            registers = -(-usage["REG"] * 32 // 256) * 256 * (threads // 32)
            assert registers * blocks <= REGISTERS, f"{name} uses {usage['REG']} registers"
    assert all(any(pattern in name for pattern in KERNELS) for name in report)


def test_batches_are_read_and_written_16_bytes_at_a_time(cuobjdump, binaries):
    code = instructions(dump(cuobjdump, binaries, "-sass"), is_mixing)
    for pattern, (wide_loads, wide_stores) in STREAMS.items():
        found = {name: opcodes for name, opcodes in code.items() if re.search(pattern, name)}
        assert found, pattern
        for name, opcodes in found.items():

            def total(prefix, opcodes=opcodes):
                return sum(count for opcode, count in opcodes.items() if re.match(prefix, opcode))

            assert not wide_loads or total(r"LDG\.E\S*\.128") > 0, name
            assert not wide_stores or total(r"STG\.E\S*\.128") > 0, name
            assert total("LDL") == total("STL") == total("ATOM") == total("RED") == 0, name
            if "cutmix_walk" not in name and "cross_entropy" not in name:  # whose ends are stored in pieces
                whole = total(r"STG\.E\S*\.128")
                assert total("STG") - whole <= ("mixup_grad" in name) * whole, name
