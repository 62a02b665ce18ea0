"""Compiles the kernels of the tile table for any architecture and reads what the machine code needs."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssl_kernels.triton import batch_hard, contrastive, sigmoid_pairs
from ssl_kernels.triton.launch import register_limit

KERNELS = {
    "forward": contrastive.contrastive_fwd_kernel,
    "expectation": contrastive.contrastive_fwd_kernel,
    "backward": contrastive.contrastive_bwd_kernel,
    "coefficient": contrastive.contrastive_coefficient_kernel,
    "sigmoid_pairs": sigmoid_pairs.sigmoid_pairs_kernel,
    "sigmoid_coefficient": sigmoid_pairs.sigmoid_coefficient_kernel,
    "batch_hard": batch_hard.batch_hard_kernel,
}
TRITON_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
VECTORS = {"x_ptr", "y_ptr", "grad_ptr", "coefficient_ptr"}
INT64 = {"x_ids_ptr", "y_ids_ptr", "positives_ptr", "labels_ptr"}
INT32 = {"x_positives_ptr", "y_positives_ptr"}
FLOAT64 = {"lse_ptr", "positive_logits_ptr", "losses_ptr", "biases_ptr"}
# Absent from a call as nt_xent_loss makes it, with a card full of rows.
ABSENT = {"x_ids_ptr", "y_ids_ptr", "row_partial_ptr", "column_partial_ptr"}
# Of the forward, in calls that keep the expectation only.
OF_EXPECTATION = {"expectation_partial_ptr"}
# Of calls with biases and limits only.
ADDITIONS = {
    "x_bias_ptr", "y_bias_ptr", "x_limit_ptr", "y_limit_ptr", "x_exempt_ptr", "y_exempt_ptr", "bias_partial_ptr",
    "x_bias_partial_ptr", "y_bias_partial_ptr",
}  # fmt: skip
UNIT_STRIDES = {"stride_xd", "stride_yd"}
FIELDS = ("REG", "STACK", "LOCAL")  # of cuobjdump's resource report


@dataclass
class Resources:
    """What one block of a compiled kernel needs."""

    registers: int
    spilled: int  # bytes of local memory a thread
    shared: int  # bytes
    threads: int
    instructions: str

    def spills_of_the_walk(self):
        """Loads and stores of local memory between the target of the longest jump back and that jump."""
        addressed = [
            (int(match[1], 16), match[2])
            for match in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", self.instructions)
        ]
        jumps = [
            (int(match[1], 16), address)
            for address, text in addressed
            if (match := re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text))
        ]
        first, last = max((jump for jump in jumps if jump[0] < jump[1]), key=lambda jump: jump[1] - jump[0])
        spills = [address for address, text in addressed if re.search(r"\b(LDL|STL)\b", text)]
        return sum(first <= address <= last for address in spills)

    def blocks_per_processor(self, registers_per_processor, shared_per_processor, threads_per_processor):
        """Blocks that fit a multiprocessor at once. Registers are handed out to warps 256 at a time."""
        per_warp = -(-self.registers * 32 // 256) * 256
        by_registers = registers_per_processor // (per_warp * self.threads // 32)
        by_shared = shared_per_processor // (self.shared + 1024)
        return min(by_registers, by_shared, threads_per_processor // self.threads)


def compile_kernel(kernel, arch, dtype, d, tile, precision="ieee", everything=False, columns=None):
    """The entry `tile` of `kernel`, for width d: as NT-Xent calls it, or with `everything` a call can have.

    Those of sigmoid_pairs take losses with their gradients, or with everything the gradients of weighted losses.
    With everything: ids, both directions, a split walk and its merge; else the square case with positives, or for the
    expectation, which has none, a full queue. `columns` is their dtype where it is another.
    """
    function = KERNELS[kernel]
    acc = "fp64" if dtype == torch.float64 else "fp32"
    absent = set() if everything else set(ABSENT)
    absent |= ADDITIONS
    absent |= {"column_partial_ptr"} if kernel == "expectation" else OF_EXPECTATION
    absent |= {"row_partial_ptr"} if kernel not in ("forward", "expectation") else set()
    absent -= {"row_partial_ptr"} if kernel == "expectation" else set()
    absent |= {"partial_ptr"} if kernel == "backward" else set()
    if kernel.startswith("sigmoid"):
        absent |= {"losses_ptr"} if everything else {"x_weight_ptr", "y_weight_ptr"}
    half = dtype == torch.float16
    absent |= set() if half else {"bound_ptr"}
    constants = {
        "SQUARE": not everything and kernel != "expectation",
        "KEEP_DIAGONAL": everything,
        "ONLY_EQUAL_IDS": False,
        "SHARED_FACTOR": contrastive._shared_factor(dtype) if kernel in ("backward", "coefficient") else None,
        "EQUAL_ARE_POSITIVE": everything,
        "PRECISION": precision,
        "NONE": torch.iinfo(torch.int64 if dtype == torch.float64 else torch.int32).min,  # of batch_hard
        "EVEN_D": d % tile.block_d == 0,
        "ONE_BLOCK_D": d <= tile.block_d,
        "BLOCK_N": tile.block_n,
        "BLOCK_M": tile.block_m,
        "BLOCK_D": tile.block_d,
    }
    if kernel not in ("forward", "expectation"):
        constants["P"] = 1
    signature, constexprs, attributes = {}, {}, {}
    for position, name in enumerate(function.arg_names):
        if name in constants or name in absent or name in UNIT_STRIDES:
            signature[name] = "constexpr"
            constexprs[(position,)] = constants.get(name, None if name in absent else 1)
        elif name.endswith("_ptr"):
            if name in VECTORS:
                element = TRITON_NAMES[columns if columns and name == "y_ptr" else dtype]
            elif name in INT64 or (kernel, name) == ("batch_hard", "partial_ptr"):
                element = "i64"
            elif name in INT32:
                element = "i32"
            elif name in FLOAT64:
                element = "fp64"
            else:
                element = acc
            signature[name] = "*" + element
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if name.startswith("stride") or (name == "D" and d % 16 == 0):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constexprs, attributes)
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if kernel == "coefficient" or (kernel, precision) == ("batch_hard", "tf32"):
        options["maxnreg"] = register_limit(tile)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def serialised(compiled, arch):
    """Whether ptxas says that wgmma instructions wait for each other: C7510 and its neighbours, by cause."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(compiled.asm["ptx"])
        command = [
            triton.knobs.nvidia.ptxas.path,
            f"-arch=sm_{arch}a",
            "-v",
            path,
            "-o",
            path.with_suffix(".cubin"),
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return "wgmma.mma_async instructions are serialized" in said


def resources(compiled):
    """Registers, spills and shared memory of a compiled kernel, from its machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("--dump-resource-usage", path)
        instructions = _cuobjdump("--dump-sass", path)
    registers, stack, local = (int(re.search(rf"\b{field}:(\d+)", usage)[1]) for field in FIELDS)
    threads = 32 * compiled.metadata.num_warps
    return Resources(registers, stack + local, compiled.metadata.shared, threads, instructions)


def _cuobjdump(option, path):
    program = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([program, option, path], capture_output=True, text=True, check=True).stdout
