"""The machine code that nvcc made for each architecture: registers, spills, occupancy and instructions.

Read from the built extension where it has CUDA code, of the architectures that it has; else compiled here. What is held
is what the headers of the kernels on the tile walk promise.
"""

import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.gpu_emulation import nvcc_path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("contrastive", "contrastive_additions", "sigmoid_pairs", "batch_hard")
SHARED_KERNELS = (
    r"(?:prepare_rows|finish_rows|sum_rows|sum_parts|coefficient_scale|normalized_rows|unscale)_kernel"
)
ARCHITECTURES = (80, 90, 100)
REGISTERS = 65536  # of a multiprocessor, handed out 256 at a time to a warp
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # of a multiprocessor; a block costs 1024 more
SMALLEST_BLOCK_LIMIT = 99 * 1024  # shared memory of a block on sm_86 and sm_89, which run sm_80's code

TWO_WHERE_THEY_FIT = {80: 1, 90: 2, 100: 2}

# Kernel, by what its mangled name holds: threads, dynamic shared memory with 3 steps of own rows, blocks per
# multiprocessor. More steps stay in shared memory only where that leaves as many blocks.
KERNELS = {
    r"contrastive_fwd_kernel.*EngineI(13__nv_bfloat16|6__half|f)EE.*Lb0E": (128, 76032, 2),
    r"contrastive_fwd_kernel.*FmaEngineIdEE(?:EE)?Lb0E": (128, 62976, 2),
    r"contrastive_fwd_kernel.*EngineI(13__nv_bfloat16|6__half|f)EE(?:EE)?Lb1E": (128, 78080, 2),
    r"contrastive_fwd_kernel.*FmaEngineIdEE(?:EE)?Lb1E": (128, 65024, 2),
    r"contrastive_bwd_kernel.*MmaEngineI13__nv_bfloat16EE(?:EE)?Li4ELi2E": (256, 79616, 1),
    r"contrastive_bwd_kernel.*MmaEngineI13__nv_bfloat16EE(?:EE)?Li4ELi4E": (256, 96000, 1),
    r"contrastive_bwd_kernel.*MmaEngineI6__halfEE(?:EE)?Li4ELi2E": (256, 79616, 1),
    r"contrastive_bwd_kernel.*MmaEngineI6__halfEE(?:EE)?Li4ELi4E": (256, 96000, 1),
    r"contrastive_bwd_kernel.*MmaEngineIfEE(?:EE)?Li4ELi4E": (256, 81792, 1),
    r"contrastive_bwd_kernel.*FmaEngineIfEE(?:EE)?Li4ELi4E": (256, 81792, 1),
    r"contrastive_bwd_kernel.*FmaEngineIdEE(?:EE)?Li4ELi4E": (256, 101376, 1),
    r"contrastive_coefficients_kernelI(?!.*AddingEngine).*MmaEngineI(13__nv_bfloat16|6__half|f)": (
        256,
        101376,
        TWO_WHERE_THEY_FIT,
    ),
    r"contrastive_coefficients_kernel.*AddingEngine.*EngineI(13__nv_bfloat16|6__half|f)": (256, 101376, 1),
    r"contrastive_coefficients_kernelI.*FmaEngineIf": (256, 101376, 1),
    r"contrastive_coefficients_kernel.*FmaEngineId": (256, 76800, 1),
    r"expectation_kernel.*MmaEngineI(13__nv_bfloat16|6__half)EE(?:EE)?Li4ELi2E": (256, 76800, 1),
    r"expectation_kernel.*MmaEngineI(13__nv_bfloat16|6__half)EE(?:EE)?Li4ELi4E": (256, 93184, 1),
    r"expectation_kernel.*MmaEngineI(13__nv_bfloat16|6__half)EE(?:EE)?Li2ELi8E": (256, 60928, 1),
    r"expectation_kernel.*EngineIfEE(?:EE)?Li4ELi8E": (256, 80512, 1),
    r"expectation_kernel.*FmaEngineIdEE(?:EE)?Li4ELi8E": (256, 98048, 1),
    r"expectation_kernel.*WideningEngine.*(13__nv_bfloat16|6__half)EE(?:EE)?Li4ELi8E": (256, 80512, 1),
    # With ids of columns, where there are any.
    r"sigmoid_pairs_fwd_kernel.*EngineI(13__nv_bfloat16|6__half|f)": (128, 76032, 2),
    r"sigmoid_pairs_fwd_kernel.*FmaEngineId": (128, 62976, 2),
    r"sigmoid_pairs_bwd_kernel.*MmaEngineI(13__nv_bfloat16|6__half)EE(?:EE)?Li4ELi2E": (256, 77824, 1),
    r"sigmoid_pairs_bwd_kernel.*MmaEngineI(13__nv_bfloat16|6__half)EE(?:EE)?Li4ELi4E": (256, 94208, 1),
    r"sigmoid_pairs_bwd_kernel.*EngineIfEE(?:EE)?Li4ELi4E": (256, 80384, 1),
    r"sigmoid_pairs_bwd_kernel.*FmaEngineIdEE(?:EE)?Li4ELi4E": (256, 98560, 1),
    r"sigmoid_pairs_coefficients_kernel.*EngineI(13__nv_bfloat16|6__half|f)": (256, 100352, 1),
    r"sigmoid_pairs_coefficients_kernel.*FmaEngineId": (256, 75776, 1),
    r"sigmoid_pairs_weight_kernel": (256, 0, 4),
    r"batch_hard_kernel.*EngineI(13__nv_bfloat16|6__half|f)": (128, 76800, 2),
    r"batch_hard_kernel.*FmaEngineId": (128, 63744, 2),
    r"batch_hard_merge_kernel": (256, 0, 4),
    r"expectation_merge_kernel": (256, 0, 3),
    r"expectation_bwd_kernel": (256, 0, 4),
    r"prepare_rows_kernel": (256, 0, 4),
    r"finish_rows_kernel": (256, 0, 4),
    r"(?<!expectation_)merge_kernel": (256, 0, 4),
    r"terms_kernel": (256, 0, 4),
    r"additions_kernel": (256, 0, 4),
    r"sum_parts_kernel": (256, 0, 4),
    r"sum_rows_kernel": (1024, 0, 1),
    r"coefficient_scale_kernel": (1024, 0, 1),
    r"normalized_rows_kernel": (256, 0, 4),
    r"unscale_kernel": (256, 0, 4),
}


@pytest.fixture(scope="module")
def cuobjdump():
    triton = pytest.importorskip("triton")
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(path) if path.exists() else shutil.which("cuobjdump")
    if found is None:
        pytest.skip("cuobjdump comes with Triton or the CUDA toolkit; neither has it here")
    return found


def make_cubin(name, arch, folder):
    """Path of the machine code of csrc/cuda/<name>.cu for sm_<arch>, from the PTX that setup.py has it made of."""
    cubin = folder / f"{name}_{arch}.cubin"
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    flags = ["-std=c++17", "-O3", "-cubin", f"-gencode=arch=compute_80,code=sm_{arch}"]
    subprocess.run([nvcc_path(), *flags, source, "-o", cubin], check=True)
    return cubin


@pytest.fixture(scope="module")
def binaries(cuobjdump, tmp_path_factory):
    """Files with the machine code of each architecture."""
    for extension in (ROOT / "ssl_kernels").glob("_C*.so"):
        listing = subprocess.run([cuobjdump, "--list-elf", extension], capture_output=True, text=True).stdout
        if built := {arch: [extension] for arch in ARCHITECTURES if f"sm_{arch}.cubin" in listing}:
            return built
    if nvcc_path() is None:
        pytest.skip("the extension has no CUDA code and nvcc is not here")
    folder = tmp_path_factory.mktemp("cubins")
    with ThreadPoolExecutor(max_workers=2) as pool:
        cubins = {
            arch: [pool.submit(make_cubin, name, arch, folder) for name in SOURCES] for arch in ARCHITECTURES
        }
    return {arch: [future.result() for future in futures] for arch, futures in cubins.items()}


def dump(cuobjdump, binaries, arch, what):
    if arch not in binaries:
        pytest.skip(f"the extension was not built for sm_{arch}")
    commands = [[cuobjdump, f"--gpu-architecture=sm_{arch}", what, file] for file in binaries[arch]]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True) for command in commands]
    return "\n".join(run.stdout for run in runs)


def is_ours(kernel):
    return any(f"{len(name)}{name}" in kernel for name in SOURCES) or re.search(SHARED_KERNELS, kernel)


def resource_report(text, wanted=is_ours):
    """{kernel: {"REG": 40, "STACK": 0, ...}} of the kernels that are wanted."""
    pairs = re.findall(r"Function (\S*ssl_kernels\S*):\s+(REG:.*)", text)
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        for name, line in pairs
        if wanted(name)
    }


OPCODE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


def instructions(text, wanted=is_ours):
    """{kernel: Counter of the opcodes with their modifiers} of the kernels that are wanted."""
    kernels = {}
    for part in text.split("Function : ")[1:]:
        if wanted(part.split()[0]):
            kernels[part.split()[0]] = Counter(OPCODE.findall(part))
    return kernels


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills_and_the_promised_occupancy(cuobjdump, binaries, arch):
    report = resource_report(dump(cuobjdump, binaries, arch, "--dump-resource-usage"))
    for pattern, (threads, shared, promised) in KERNELS.items():
        blocks = promised[arch] if isinstance(promised, dict) else promised
        found = {name: usage for name, usage in report.items() if re.search(pattern, name)}
        assert found, f"{pattern} is missing"
        for name, usage in found.items():
            assert usage["STACK"] == 0 and usage["LOCAL"] == 0, name
            registers = -(-usage["REG"] * 32 // 256) * 256 * (threads // 32)
            assert registers * blocks <= REGISTERS, f"{name} uses {usage['REG']} registers"
            assert (shared + usage["SHARED"] + 1024) * blocks <= SHARED[arch], name
            assert shared <= SMALLEST_BLOCK_LIMIT, name
    known = [name for name in report if any(re.search(pattern, name) for pattern in KERNELS)]
    assert sorted(known) == sorted(report)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tensor_cores_and_vector_accesses_are_used(cuobjdump, binaries, arch):
    """In the tile loops: tensor cores with ldmatrix, or FMA; 16-byte cp.async, 8-byte stores."""
    code = instructions(dump(cuobjdump, binaries, arch, "-sass"))
    tile_kernels = {name: opcodes for name, opcodes in code.items() if "EngineI" in name}
    assert len(tile_kernels) == 108
    for name, opcodes in tile_kernels.items():

        def total(prefix, opcodes=opcodes):
            return sum(count for opcode, count in opcodes.items() if opcode.startswith(prefix))

        assert total("LDGSTS.E.BYPASS.128") > 0, name
        assert total("LDL") == total("STL") == total("ATOM") == total("RED") == 0, name
        if "MmaEngine" in name:
            kind = "TF32" if "MmaEngineIf" in name else "BF16" if "bfloat16" in name else "F32"
            hmma = {opcode: count for opcode, count in opcodes.items() if opcode.startswith("HMMA")}
            assert hmma and all(kind in opcode for opcode in hmma), name
            assert total("LDSM.16.M88.4") > 0, name
            assert "batch_hard" in name or total("MUFU.EX2") >= 16, name
        else:
            # The loop over a step of D is unrolled as far as the compiler likes: a fragment's worth at least.
            assert total("DFMA" if "FmaEngineId" in name else "FFMA") >= 64 and total("LDS.128") > 0, name
        if "WideningEngine" in name:  # 8 bytes of the narrow columns, widened into 16
            assert total("LDG.E.64") > 0 and total("STS.128") > 0, name
        if re.search("Shape|coefficients", name) and "FmaEngineId" not in name:
            # One store of a single number more per row of a fragment: the gradient of a bias.
            singles = 4 if re.search(r"(?:bwd|coefficients)_kernel.*AddingEngine", name) else 0
            assert total("STG.E") - singles == total("STG.E.64") > 0, name
    for name, opcodes in code.items():
        if "prepare_rows_kernel" in name:
            assert any(opcode.startswith("LDG.E.128") for opcode in opcodes), name


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_narrow_columns_are_loaded_before_the_products_and_stored_after(cuobjdump, binaries, arch):
    """A fragment's products of a step at least lie between, so that they hide the way from memory."""
    text = dump(cuobjdump, binaries, arch, "-sass")
    kernels = [part for part in text.split("Function : ")[1:] if "WideningEngine" in part.split()[0]]
    assert kernels
    for part in kernels:
        products, most = None, 0
        for opcode in OPCODE.findall(part):
            if opcode.startswith("LDG.E.64"):
                products = 0
            elif opcode.startswith("STS.128"):
                most = max(most, products or 0)
                products = None
            elif products is not None:
                products += opcode.startswith(("HMMA", "FFMA"))
        assert most >= 16, part.split()[0]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_of_any_operation_spills(cuobjdump, binaries, arch):
    """Of every operation where the extension was built, else of those on the tile walk."""
    report = resource_report(dump(cuobjdump, binaries, arch, "--dump-resource-usage"), lambda kernel: True)
    assert not [name for name, usage in report.items() if usage["STACK"] or usage["LOCAL"]]
    if binaries[arch][0].suffix == ".so":
        for file in (ROOT / "csrc" / "cuda").glob("*.cuh"):
            for kernel in re.findall(r"\b(\w+_kernel)\(", file.read_text()):
                assert any(f"{len(kernel)}{kernel}" in name for name in report), kernel
