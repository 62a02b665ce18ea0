"""Every entry of the tile table compiles, spills nothing and fits as many blocks as it says."""

import pytest
import torch

from ssl_kernels.triton.tiles import TILES, Tile
from tests.triton.compiled import compile_kernel, resources

# Registers, shared memory and threads of a multiprocessor, and shared memory a block may take.
PROCESSORS = {
    80: (65536, 164 << 10, 2048, 163 << 10),
    86: (65536, 100 << 10, 1536, 99 << 10),
    90: (65536, 228 << 10, 2048, 227 << 10),
    100: (65536, 228 << 10, 2048, 227 << 10),
}
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
    in [(80, "half", "backward", 128), (90, "half", "forward", 128), (100, "half", "coefficient", None)]
]


def _name(entry):
    return "-".join(map(str, entry[:4]))


def _check(entry, dtype, everything):
    arch, dtype_class, kernel, largest_d, tile = entry
    precision = "tf32" if dtype_class == "tf32" else "ieee"
    compiled = compile_kernel(kernel, arch, dtype, largest_d or 512, tile, precision, everything)
    needs = resources(compiled)
    *processor, shared_per_block = PROCESSORS[arch]
    assert needs.spilled == 0
    assert needs.shared <= shared_per_block
    assert needs.blocks_per_processor(*processor) >= tile.blocks
    if dtype_class in ("half", "tf32"):
        assert any(name in needs.instructions for name in ("HMMA", "HGMMA", "UTCHMMA")), "no tensor cores"
        assert "LDGSTS" in needs.instructions, "no asynchronous copies"


@pytest.mark.parametrize("entry", SAMPLE, ids=_name)
def test_entry_keeps_its_promise(entry):
    _check(entry, DTYPES[entry[1]][0], everything=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES["half"], ids=str)
@pytest.mark.parametrize("arch", TILES)
def test_expectation_fits_the_tiles_of_the_backward(arch, dtype):
    for largest_d, tile in TILES[arch]["half"]["backward"]:
        if largest_d <= 128:
            compiled = compile_kernel("expectation", arch, dtype, largest_d, Tile(*tile), everything=True)
            needs = resources(compiled)
            assert needs.spilled == 0 and needs.shared <= PROCESSORS[arch][3], largest_d


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
            assert kernel == "backward" or widths[-1] == float("inf")
            for largest_d, tile in entries:
                if kernel == "backward":
                    assert Tile(*tile).block_d == largest_d
