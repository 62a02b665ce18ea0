"""ldmatrix, stmatrix, mma.sync and wmma against numpy, fragment by fragment as the PTX ISA lays them out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.gpu_emulation import STREAM, PtxError
from tests.gpu_emulation.snippets import at, bfloat16_bits, bfloat16_values, launch

KERNELS = Path(__file__).parent / "kernels"
LANE = np.arange(32)
GROUP, THREAD = LANE // 4, LANE % 4


def store_words(base, registers):
    """Each lane stores its registers, `len(registers)` words from base + lane."""
    lines = [*at(base, "%i", 4 * len(registers))]
    return lines + [f"st.global.b32 [%address+{4 * i}], {register};" for i, register in enumerate(registers)]


def load_words(base, registers):
    lines = [*at(base, "%i", 4 * len(registers))]
    return lines + [f"ld.global.b32 {register}, [%address+{4 * i}];" for i, register in enumerate(registers)]


# Copies 512 bytes (16 a lane) from %b0 to shared memory, or from there to %b0; rows of 16 bytes.
TILE = ".shared .align 16 .b8 tile[512];"
ROW_ADDRESS = ["mov.u32 %t0, tile;", "shl.b32 %t1, %i, 4;", "add.u32 %t0, %t0, %t1;"]


def move(source_space, source, space, to):
    four = "{%v0, %v1, %v2, %v3}"
    load, store = f"ld.{source_space}.v4.b32 {four}, [{source}];", f"st.{space}.v4.b32 [{to}], {four};"
    return ["{ .reg .b32 %v<4>;", load, store, "}"]


CHUNK = at("%b0", "%i", 16)
TO_SHARED = [*ROW_ADDRESS, *CHUNK, *move("global", "%address", "shared", "%t0"), "bar.sync 0;"]
FROM_SHARED = ["bar.sync 0;", *CHUNK, *move("shared", "%t0", "global", "%address")]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(gpu, count, transposed):
    matrices = np.random.default_rng(0).integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    out = np.zeros((32, count), np.uint32)
    registers = [f"%t{2 + i}" for i in range(count)]
    trans = ".trans" if transposed else ""
    lines = [TILE, *TO_SHARED]
    lines += [f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{', '.join(registers)}}}, [%t0];"]
    launch(gpu, [*lines, *store_words("%b1", registers)], [matrices, out])
    for i in range(count):
        matrix = matrices[i].T if transposed else matrices[i]
        pairs = np.ascontiguousarray(out[:, i]).view(np.uint16).reshape(32, 2)
        assert (pairs == matrix.reshape(32, 2)).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_stmatrix(gpu, transposed):
    if gpu.arch < 90:
        pytest.skip("stmatrix needs sm_90")
    matrices, values = (
        np.zeros((4, 8, 8), np.uint16),
        np.random.default_rng(0).integers(0, 2**32, (32, 4)).astype(np.uint32),
    )
    registers = [f"%t{2 + i}" for i in range(4)]
    trans = ".trans" if transposed else ""
    lines = [TILE, *ROW_ADDRESS, *load_words("%b1", registers)]
    lines += [
        f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%t0], {{{', '.join(registers)}}};",
        *FROM_SHARED,
    ]
    launch(gpu, lines, [matrices, values])
    for i in range(4):
        stored = matrices[i].T if transposed else matrices[i]
        assert (
            stored.reshape(32, 2) == np.ascontiguousarray(values[:, i]).view(np.uint16).reshape(32, 2)
        ).all()


def test_misaligned_row_is_noticed(gpu):
    if not gpu.emulated:
        pytest.skip("a card does not notice")
    with pytest.raises(PtxError, match="misaligned 16-byte access"):
        launch(
            gpu, [TILE, "mov.u32 %t0, tile;", "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%t1}, [%t0+8];"], []
        )


def fragment_a(k, per_register, m=16):
    """Rows and columns, each (32, elements), of the elements of A that a lane holds, register by register."""
    registers = m * k // 32 // per_register
    rows, columns = [], []
    for i in range(registers):
        for e in range(per_register):
            rows.append(GROUP + 8 * (i % (m // 8)))
            columns.append(per_register * (THREAD + 4 * (i // (m // 8))) + e)
    return np.stack(rows, 1), np.stack(columns, 1)


def fragment_b(k, per_register):
    rows, columns = [], []
    for i in range(k * 8 // 32 // per_register):
        for e in range(per_register):
            rows.append(per_register * (THREAD + 4 * i) + e)
            columns.append(GROUP)
    return np.stack(rows, 1), np.stack(columns, 1)


def fragment_c(m=16):
    elements = range(m * 8 // 32)
    return np.stack([GROUP + 8 * (i // 2) for i in elements], 1), np.stack(
        [THREAD * 2 + i % 2 for i in elements], 1
    )


def random_matrix(shape, seed):
    """Multiples of 1/8 of few bits: sums of products are exact in every accumulator."""
    return np.random.default_rng(seed).integers(-16, 17, shape) / 8.0


ENCODE = {
    "f16": lambda x: x.astype(np.float16).view(np.uint16),
    "bf16": lambda x: bfloat16_bits(x.astype(np.float32)),
    "tf32": lambda x: x.astype(np.float32).view(np.uint32),
    "f32": lambda x: x.astype(np.float32).view(np.uint32),
    "f64": lambda x: x.astype(np.float64).view(np.uint64),
}


def run_mma(gpu, m, k, kind, accumulator):
    a, b, c = random_matrix((m, k), 0), random_matrix((k, 8), 1), random_matrix((m, 8), 2)
    per_register = 2 if kind in ("f16", "bf16") else 1
    fragments = [
        ENCODE[kind](a)[fragment_a(k, per_register, m)],
        ENCODE[kind](b)[fragment_b(k, per_register)],
        ENCODE[accumulator](c)[fragment_c(m)],
    ]
    fragments = [np.ascontiguousarray(f) for f in fragments]
    size = 8 if kind == "f64" else 4
    counts = [f.nbytes // 32 // size for f in fragments]
    d = np.zeros_like(fragments[2])
    lines, names = [f".reg .b{8 * size} %r<{sum(counts) + counts[2]}>;"], []
    for i, count in enumerate(counts):
        names.append([f"%r{sum(counts[:i]) + j}" for j in range(count)])
        lines += at(f"%b{i}", "%i", count * size)
        lines += [f"ld.global.b{8 * size} {name}, [%address+{j * size}];" for j, name in enumerate(names[i])]
    result = [f"%r{sum(counts) + j}" for j in range(counts[2])]
    operands = ", ".join("{" + ", ".join(group) + "}" for group in [result, *names])
    lines += [f"mma.sync.aligned.m{m}n8k{k}.row.col.{accumulator}.{kind}.{kind}.{accumulator} {operands};"]
    lines += at("%b3", "%i", counts[2] * size)
    lines += [f"st.global.b{8 * size} [%address+{j * size}], {name};" for j, name in enumerate(result)]
    counters = launch(gpu, lines, [*fragments, d])
    if gpu.emulated:
        assert counters.mma == 1 and counters.mma_flops == 2 * m * 8 * k
    found = np.empty((m, 8))
    found[fragment_c(m)] = d.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[accumulator])
    np.testing.assert_array_equal(found, a @ b + c)


@pytest.mark.parametrize(
    "k, kind, accumulator",
    [
        (8, "f16", "f32"),
        (16, "f16", "f32"),
        (8, "f16", "f16"),
        (16, "f16", "f16"),
        (8, "bf16", "f32"),
        (16, "bf16", "f32"),
        (4, "tf32", "f32"),
        (8, "tf32", "f32"),
    ],
)
def test_mma(gpu, k, kind, accumulator):
    run_mma(gpu, 16, k, kind, accumulator)


def test_mma_f64(gpu):
    run_mma(gpu, 8, 4, "f64", "f64")


@pytest.mark.parametrize("k", [4, 8, 16])
def test_mma_f64_of_16_rows(gpu, k):
    if gpu.arch < 90:
        pytest.skip("mma.m16n8.f64 needs sm_90")
    run_mma(gpu, 16, k, "f64", "f64")


def test_tf32_ignores_the_lower_bits(gpu):
    """1 + 2^-11 has a bit that tf32 lacks: the product is 1."""
    one, almost = np.full((32, 4), 1.0, np.float32), np.zeros((32, 4), np.float32)
    almost[:, :] = 1 + 2.0**-11
    out = np.zeros((32, 4), np.float32)
    lines = [
        *load_words("%b0", ["%t0", "%t1", "%t2", "%t3"]),
        *load_words("%b1", ["%t4", "%t5", "%t6", "%t7"]),
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
        "{%t8, %t9, %t10, %t11}, {%t0, %t1, %t2, %t3}, {%t4, %t5}, "
        "{0f00000000, 0f00000000, 0f00000000, 0f00000000};",
        *store_words("%b2", ["%t8", "%t9", "%t10", "%t11"]),
    ]
    launch(gpu, lines, [almost, one, out])
    assert (out == 8.0).all()


def test_wmma(gpu, nvcc):
    library = gpu.cuda_library([KERNELS / "wmma_product.cu"])
    for kind, dtype in ((0, torch.float16), (1, torch.bfloat16)):
        a, b = (torch.from_numpy(random_matrix((16, 16), s)).to(gpu.device, dtype) for s in (0, 1))
        c = torch.zeros(16, 16, device=gpu.device)
        library.call("wmma_product_launch", a, b, c, kind, STREAM, warp_races=False)
        assert (c == a.float() @ b.float().T).all()


def test_bfloat16_helpers_round_trip():
    x = bfloat16_values(np.arange(0, 2**15, 7, dtype=np.uint16))
    assert (bfloat16_values(bfloat16_bits(x[np.isfinite(x)])) == x[np.isfinite(x)]).all()
