"""Every entry of the tile table compiles, spills nothing in its walk and fits as many blocks as it says."""

import re

import pytest
import torch
import triton

from ssl_kernels.triton.launch import find_tile
from ssl_kernels.triton.tiles import TILES, WIDEST_EXPECTATION, Tile
from tests.triton.compiled import compile_kernel, resources, serialised

# Registers, shared memory and threads of a multiprocessor, and shared memory a block may take.
PROCESSORS = {
    80: (65536, 164 << 10, 2048, 163 << 10),
    86: (65536, 100 << 10, 1536, 99 << 10),
    90: (65536, 228 << 10, 2048, 227 << 10),
    100: (65536, 228 << 10, 2048, 227 << 10),
}
TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
DTYPES = {
    "half": (torch.bfloat16, torch.float16),
    "float32": (torch.float32,),
    "tf32": (torch.float32,),
    "float64": (torch.float64,),
}
ENTRIES = [
    (arch, dtype_class, kernel, largest_d, Tile(*tile))
    for arch, dtype_classes in TILES.items()
    for dtype_class, kernels in dtype_classes.items()
    for kernel, entries in kernels.items()
    for largest_d, tile in entries
]
SAMPLE = [
    entry
    for entry in ENTRIES
    if entry[:4]
    in [
        (80, "half", "backward", 128),
        (90, "half", "forward", 128),
        (90, "half", "expectation", 128),
        (100, "half", "coefficient", None),
        (90, "float64", "coefficient", None),
    ]
]


def _check_spills(needs, kernel):
    """None; with Triton 3.6 up to 32 bytes per thread, and nothing that the walk over columns reads or writes."""
    if TRITON >= (3, 8):
        assert needs.spilled == 0
    elif kernel in ("coefficient", "sigmoid_coefficient"):  # a program has one tile
        assert needs.spilled <= 24
    else:
        assert needs.spilled <= 32 and (needs.spilled == 0 or needs.spills_of_the_walk() == 0)


def _name(entry):
    return "-".join(map(str, entry[:4]))


def _check(entry, dtype, everything):
    arch, dtype_class, kernel, largest_d, tile = entry
    precision = "tf32" if dtype_class == "tf32" else "ieee"
    compiled = compile_kernel(kernel, arch, dtype, largest_d or 512, tile, precision, everything)
    needs = resources(compiled)
    *processor, shared_per_block = PROCESSORS[arch]
    _check_spills(needs, kernel)
    assert needs.shared <= shared_per_block
    assert needs.blocks_per_processor(*processor) >= tile.blocks
    if dtype_class in ("half", "tf32"):
        assert any(name in needs.instructions for name in ("HMMA", "HGMMA", "UTCHMMA")), "no tensor cores"
    if dtype_class == "half" and arch == 90:
        assert "HGMMA" in needs.instructions and not serialised(compiled, arch)
    if kernel == "coefficient":
        stores = re.findall(r"\bSTG\.E((?:\.\w+)*)", needs.instructions)
        assert not any(re.search(r"U?16|U8", width) for width in stores) and any(
            ".128" in width for width in stores
        )
    if dtype_class == "float64" and arch in (80, 90):  # as ssl_kernels/preference.py says
        assert "DMMA" in needs.instructions, "no tensor cores"
    if dtype_class in ("half", "tf32") and tile.num_stages > 1:
        assert "LDGSTS" in needs.instructions, "no asynchronous copies"


@pytest.mark.parametrize("entry", SAMPLE, ids=_name)
def test_entry_keeps_its_promise(entry):
    _check(entry, DTYPES[entry[1]][0], everything=True)


@pytest.mark.slow
@pytest.mark.parametrize("columns", DTYPES["half"], ids=str)
@pytest.mark.parametrize("dtype_class", ["float32", "tf32"])
@pytest.mark.parametrize("arch", TILES)
def test_expectation_of_a_narrow_queue_fits_its_tiles(arch, dtype_class, columns):
    precision = "tf32" if dtype_class == "tf32" else "ieee"
    for largest_d, tile in TILES[arch][dtype_class]["expectation"]:
        options = {"everything": True, "columns": columns}
        compiled = compile_kernel(
            "expectation", arch, torch.float32, largest_d, Tile(*tile), precision, **options
        )
        needs = resources(compiled)
        _check_spills(needs, "expectation")
        assert needs.shared <= PROCESSORS[arch][3], largest_d


@pytest.mark.slow
@pytest.mark.parametrize("everything", [False, True], ids=["total", "weighted"])
@pytest.mark.parametrize("dtype_class", DTYPES)
@pytest.mark.parametrize(
    "kernel, table", [("sigmoid_pairs", "expectation"), ("sigmoid_coefficient", "coefficient")]
)
@pytest.mark.parametrize("arch", TILES)
def test_sigmoid_pairs_fits_its_tiles(arch, kernel, table, dtype_class, everything):
    precision = "tf32" if dtype_class == "tf32" else "ieee"
    for dtype in DTYPES[dtype_class]:
        for largest_d, tile in TILES[arch][dtype_class][table]:
            if table == "expectation" and find_tile("backward", arch, dtype_class, largest_d) is None:
                continue  # such rows go through coefficients
            compiled = compile_kernel(
                kernel, arch, dtype, largest_d or 512, Tile(*tile), precision, everything
            )
            needs = resources(compiled)
            _check_spills(needs, kernel)
            assert needs.shared <= PROCESSORS[arch][3], (dtype, largest_d)


@pytest.mark.slow
@pytest.mark.parametrize("dtype_class", DTYPES)
@pytest.mark.parametrize("arch", TILES)
def test_batch_hard_fits_the_tiles_of_the_forward(arch, dtype_class):
    precision = "tf32" if dtype_class == "tf32" else "ieee"
    for dtype in DTYPES[dtype_class]:
        for largest_d, tile in TILES[arch][dtype_class]["forward"]:
            compiled = compile_kernel(
                "batch_hard", arch, dtype, largest_d or 512, Tile(*tile), precision, True
            )
            needs = resources(compiled)
            _check_spills(needs, "batch_hard")
            assert needs.shared <= PROCESSORS[arch][3], (dtype, largest_d)


@pytest.mark.parametrize("arch", TILES)
def test_every_card_has_the_expectation_tiles_that_are_promised(arch):
    for dtype_class, itemsize in (("half", 2), ("float32", 4), ("tf32", 4), ("float64", 8)):
        assert TILES[arch][dtype_class]["expectation"][-1][0] == WIDEST_EXPECTATION[itemsize]


@pytest.mark.slow
@pytest.mark.parametrize("everything", [False, True], ids=["nt_xent", "everything"])
@pytest.mark.parametrize("entry", ENTRIES, ids=_name)
def test_every_entry_keeps_its_promise(entry, everything):
    for dtype in DTYPES[entry[1]]:
        _check(entry, dtype, everything)


def test_entries_are_in_order_and_cover_every_width():
    for kernels in (kernels for dtype_classes in TILES.values() for kernels in dtype_classes.values()):
        for kernel, entries in kernels.items():
            widths = [float("inf") if largest_d is None else largest_d for largest_d, _ in entries]
            assert widths == sorted(set(widths))
            whole_rows = kernel in ("backward", "expectation")
            assert whole_rows or widths[-1] == float("inf")
            for largest_d, tile in entries:
                if whole_rows:
                    assert Tile(*tile).block_d == largest_d
