"""The machine code of the Triton mixing kernels: batches are read and written 16 bytes at a time, nothing spills."""

import re
from dataclasses import dataclass

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssl_kernels.triton import cutmix, mixup, mixup_cross_entropy, mixup_normalize
from tests.helpers import DTYPES
from tests.triton.compiled import TRITON_NAMES, resources

ARCHITECTURES = (80, 90, 100)
PIXELS = {1: "u8", 2: "i16", 4: "i32", 8: "i64"}
# What the pointers of every kernel point to, where it is not the batch.
ELEMENTS = {
    **dict.fromkeys(
        ("word_ptr", "boxes_ptr", "source_ptr", "target_ptr", "partner_ptr", "permutation_ptr"), "i64"
    ),
    **dict.fromkeys(("loss_ptr", "lse_ptr", "counted_ptr", "grad_loss_ptr", "numbers_ptr"), "fp64"),
    **dict.fromkeys(("own_ptr", "next_ptr", "partial_ptr", "lam_ptr", "weight_ptr"), "acc"),
    **dict.fromkeys(("mean_ptr", "std_ptr"), "fp32"),
    "inverse_ptr": "i32",
}


@dataclass
class Code:
    """A kernel as its launcher calls it on a batch whose samples are multiples of 16 bytes."""

    name: str
    kernel: object
    elements: dict  # of the batches, by pointer
    acc: str
    constants: dict
    warps: int
    reads: bool = True  # 16 bytes at a time
    writes: bool = True
    narrow_loads: int = 0
    registers: int | None = None  # per thread at most
    narrow_stores: tuple = ()  # other stores that belong there


def codes():
    for dtype in DTYPES:
        name, size = TRITON_NAMES[dtype], dtype.itemsize
        acc, vector = "fp64" if dtype == torch.float64 else "fp32", 16 // size
        batch = dict.fromkeys(("x_ptr", "out_ptr", "grad_ptr", "grad_x_ptr", "logits_ptr"), name)
        walk = {"VECTOR": vector, "BLOCK": mixup.WALK_BYTES // size}
        yield Code("mixup", mixup.mixup_walk_kernel, batch, acc, walk, mixup.WALK_WARPS)
        grad = {"VECTOR": vector, "BLOCK": mixup.GRAD_BYTES // size}
        yield Code(
            "mixup_bwd", mixup.mixup_grad_kernel, batch, acc, grad, mixup.GRAD_WARPS, narrow_stores=(1,)
        )
        gather = {"VECTOR": vector, "BLOCK": cutmix.BYTES // size, "SAMPLES": cutmix.SAMPLES}
        gather |= {
            "BACKWARD": True,
            "ACC": triton.language.float64 if acc == "fp64" else triton.language.float32,
        }
        yield Code("cutmix_bwd", cutmix.cutmix_gather_kernel, batch, acc, gather, cutmix.WARPS)
        for classes in (1000, 1024):
            options = mixup_cross_entropy._block(classes)
            warps = options.pop("num_warps")
            flags = {"SMOOTH": True, "WEIGHTS": False, "PARTNER_IS_CLASS": False}
            rows = {"VECTOR": vector, **flags, **options}
            forward, backward = (
                getattr(mixup_cross_entropy, f"mixup_cross_entropy_{kind}_kernel")
                for kind in ("loss", "grad")
            )
            # The logits of a row's two targets are single numbers.
            single = 2 if size == 2 else 0
            registers = mixup_cross_entropy.FLOAT64_REGISTERS if size == 8 else None
            found = {"writes": False, "narrow_loads": single, "registers": registers}
            yield Code(f"loss-{classes}", forward, batch, acc, rows, warps, **found)
            yield Code(f"grad-{classes}", backward, batch, acc, rows, warps)
        if dtype != torch.float64:
            images = {"x_ptr": "u8", "out_ptr": name}
            both = {"VECTOR_X": 16, "VECTOR_OUT": vector, "BLOCK": mixup_normalize.BLOCK}
            kernel = mixup_normalize.mixup_normalize_kernel
            yield Code("mixup_normalize", kernel, images, "fp32", both, mixup_normalize.WARPS)
    for size, name in PIXELS.items():
        batch, block = dict.fromkeys(("x_ptr", "out_ptr"), name), cutmix.BYTES // size
        walk = {"VECTOR": 16 // size, "BLOCK": block}
        yield Code(
            "cutmix_",
            cutmix.cutmix_walk_kernel,
            batch,
            "fp32",
            walk,
            cutmix.WARPS,
            narrow_stores=(16 // size,),
        )
        gather = walk | {"SAMPLES": cutmix.SAMPLES, "BACKWARD": False, "ACC": triton.language.float32}
        yield Code("cutmix", cutmix.cutmix_gather_kernel, batch, "fp32", gather, cutmix.WARPS)


def compile_for(arch, code):
    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(code.kernel.arg_names):
        if name in code.constants:
            signature[name], constants[(position,)] = "constexpr", code.constants[name]
        elif name.endswith("_ptr"):
            element = code.elements.get(name) or ELEMENTS[name]
            signature[name] = "*" + (code.acc if element == "acc" else element)
            attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(code.kernel, signature, constants, attributes)
    options = {"num_warps": code.warps, "maxnreg": code.registers}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def label(code):
    return f"{code.name}-{code.elements.get('out_ptr') or code.elements['logits_ptr']}"


def cases():
    """Every kernel, dtype and architecture; those of half precision on sm_90 in the default run."""
    for arch in ARCHITECTURES:
        for code in codes():
            quick = arch == 90 and label(code).endswith(("fp16", "i16"))
            yield pytest.param(
                arch, code, id=f"{label(code)}-{arch}", marks=[] if quick else pytest.mark.slow
            )


@pytest.mark.parametrize("arch, code", list(cases()))
def test_batches_are_read_and_written_16_bytes_at_a_time(arch, code):
    found = resources(compile_for(arch, code))
    assert found.spilled == 0
    loads, stores = (
        [match[1] for match in re.finditer(rf"\b{opcode}\.E((?:\.\w+)*)", found.instructions)]
        for opcode in ("LDG", "STG")
    )
    assert not code.reads or any(".128" in access for access in loads)
    narrow = [access for access in loads if re.search(r"\.[US](8|16)\b", access)]
    assert len(narrow) <= code.narrow_loads, loads
    if code.writes:
        narrow = [access for access in stores if ".128" not in access]
        assert len(narrow) < len(stores)
        assert len(narrow) <= sum(code.narrow_stores), stores
