"""Tiles of the Triton kernels: TILES[architecture][dtype class][kernel] = [(largest D, tile), ...].

Plain data, so that nothing is tuned at import; `python -m ssl_kernels.triton.tune` times candidates on a card
and writes ENTRIES anew, which says each tile once for all architectures that take it. The first entry of a table
whose largest D covers D counts, None covers every D. A D that no entry of "backward" covers takes "coefficient"
instead, and torch's own matrix products (panels.py).

Architectures: 80 (A100), 86 (also 8.7, 8.8, 8.9 and 12.x: a hundred KB of shared memory), 90 (H100), 100 (B200).
Dtype classes: half (float16, bfloat16), float32, tf32 (float32 where torch allows TF32), float64.

    expectation             the forward that also sums columns: a block_n × block_d accumulator, block_d covers D;
                            sigmoid_pairs takes these tiles too where "backward" has one, else "coefficient"
    forward, coefficient    block_n rows × block_m columns of logits, block_d features at a time
    backward                the same, and a block_n × block_d accumulator: block_d covers D

blocks is how many blocks fit a multiprocessor at once at least, by registers, shared memory and threads. With
Triton 3.8 no entry spills a register, with 3.6 none in its walk over columns. contrastive's "coefficient" is
compiled for no more registers than blocks leaves it.
tests/triton/test_tiles.py holds every entry to both.
"""

from typing import NamedTuple


class Tile(NamedTuple):
    """Blocking of one kernel; num_warps and num_stages as Triton takes them."""

    block_n: int
    block_m: int
    block_d: int
    num_warps: int
    num_stages: int
    blocks: int


# The width, by bytes per element, up to which every card has an "expectation" tile.
WIDEST_EXPECTATION = {2: 256, 4: 256, 8: 128}


def keeps_expectation(rows):
    """Whether the forward has a tile that holds the expectation of the columns beside the logits, on any card."""
    return rows.shape[1] <= WIDEST_EXPECTATION[rows.element_size()]


# Dtype class, kernel, largest D, the tile without its blocks, and those by architecture.
ENTRIES = [
    ("half", "forward", 16, (128, 64, 16, 8, 3), {80: 1, 86: 1, 90: 1}),
    ("half", "forward", 16, (128, 32, 16, 8, 3), {100: 1}),
    ("half", "forward", 32, (128, 64, 32, 8, 3), {80: 1, 86: 1, 90: 1}),
    ("half", "forward", 32, (128, 32, 32, 8, 3), {100: 1}),
    ("half", "forward", 64, (128, 64, 64, 8, 3), {80: 1, 86: 1, 90: 1, 100: 1}),
    ("half", "forward", 128, (128, 64, 128, 8, 3), {80: 1, 86: 1, 90: 1, 100: 1}),
    ("half", "forward", 256, (128, 64, 256, 8, 2), {80: 1, 90: 1}),
    ("half", "forward", 256, (128, 32, 256, 8, 2), {100: 1}),
    ("half", "forward", None, (128, 64, 64, 8, 3), {80: 1, 86: 1, 90: 1, 100: 1}),
    ("half", "expectation", 16, (64, 32, 16, 4, 2), {80: 2}),
    ("half", "expectation", 16, (128, 16, 16, 8, 2), {86: 2}),
    ("half", "expectation", 16, (128, 32, 16, 8, 2), {90: 1}),
    ("half", "expectation", 32, (128, 32, 32, 8, 2), {80: 1, 86: 1, 90: 1}),
    ("half", "expectation", 32, (64, 32, 32, 4, 2), {100: 2}),
    ("half", "expectation", 64, (128, 32, 64, 8, 2), {80: 1, 86: 1, 90: 1}),
    ("half", "expectation", 64, (64, 32, 64, 4, 2), {100: 2}),
    ("half", "expectation", 128, (128, 16, 128, 8, 2), {80: 1, 86: 1}),
    ("half", "expectation", 128, (128, 32, 128, 8, 2), {90: 1, 100: 1}),
    ("half", "expectation", 256, (64, 16, 256, 8, 2), {80: 1, 86: 1, 100: 1}),
    # With two stages ptxas makes bfloat16's wgmma instructions wait for each other.
    ("half", "expectation", 256, (64, 16, 256, 8, 1), {90: 1}),
    ("half", "backward", 16, (64, 32, 16, 4, 2), {80: 3}),
    ("half", "backward", 16, (128, 32, 16, 8, 2), {86: 1, 90: 1}),
    ("half", "backward", 32, (128, 32, 32, 8, 2), {80: 1, 86: 1, 90: 1, 100: 1}),
    ("half", "backward", 64, (128, 32, 64, 8, 2), {80: 1, 86: 1, 90: 1, 100: 1}),
    ("half", "backward", 128, (128, 16, 128, 8, 2), {80: 1, 86: 1}),
    ("half", "backward", 128, (128, 32, 128, 8, 2), {90: 1, 100: 1}),
    ("half", "coefficient", None, (128, 64, 64, 8, 3), {80: 2, 86: 2, 90: 2, 100: 1}),
    ("float32", "forward", None, (32, 64, 16, 4, 2), {80: 3, 86: 1, 100: 2}),
    ("float32", "forward", None, (32, 32, 16, 4, 3), {90: 3}),
    ("float32", "expectation", 32, (32, 16, 32, 4, 1), {80: 1}),
    ("float32", "expectation", 32, (32, 32, 32, 4, 1), {86: 1, 90: 1, 100: 1}),
    ("float32", "expectation", 64, (16, 32, 64, 4, 1), {80: 1, 90: 1, 100: 1}),
    ("float32", "expectation", 64, (32, 16, 64, 8, 1), {86: 1}),
    ("float32", "expectation", 128, (32, 16, 128, 4, 1), {80: 1, 86: 1, 100: 1}),
    ("float32", "expectation", 128, (32, 64, 128, 8, 1), {90: 1}),
    ("float32", "expectation", 256, (32, 16, 256, 8, 1), {80: 2, 90: 2}),
    ("float32", "expectation", 256, (16, 16, 256, 4, 1), {86: 1}),
    ("float32", "expectation", 256, (16, 16, 256, 8, 1), {100: 1}),
    ("float32", "coefficient", None, (64, 64, 16, 4, 2), {80: 4, 86: 1, 90: 4, 100: 4}),
    ("tf32", "forward", None, (64, 64, 32, 4, 3), {80: 2, 86: 2, 90: 2, 100: 2}),
    ("tf32", "expectation", 64, (64, 32, 64, 4, 1), {80: 1, 86: 1, 90: 1}),
    ("tf32", "expectation", 64, (64, 32, 64, 8, 1), {100: 2}),
    ("tf32", "expectation", 128, (32, 32, 128, 4, 1), {80: 1, 90: 1, 100: 1}),
    ("tf32", "expectation", 128, (64, 32, 128, 4, 1), {86: 1}),
    ("tf32", "expectation", 256, (32, 16, 256, 8, 1), {80: 1, 86: 1, 90: 1, 100: 1}),
    ("tf32", "coefficient", None, (64, 64, 32, 4, 3), {80: 3, 86: 1, 90: 3}),
    ("tf32", "coefficient", None, (64, 64, 32, 8, 3), {100: 2}),
    ("float64", "forward", None, (32, 16, 32, 4, 2), {80: 3, 90: 3}),
    ("float64", "forward", None, (32, 16, 16, 4, 2), {86: 1}),
    ("float64", "forward", None, (32, 16, 16, 8, 2), {100: 2}),
    ("float64", "expectation", 64, (16, 16, 64, 4, 1), {80: 1, 86: 1, 100: 1}),
    ("float64", "expectation", 64, (16, 32, 64, 4, 1), {90: 1}),
    ("float64", "expectation", 128, (16, 16, 128, 4, 1), {80: 1}),
    ("float64", "expectation", 128, (16, 16, 128, 8, 1), {86: 1, 90: 1, 100: 1}),
    ("float64", "coefficient", None, (32, 16, 16, 4, 2), {80: 7, 86: 1}),
    ("float64", "coefficient", None, (16, 32, 16, 4, 2), {90: 7, 100: 7}),
]


def tables(entries):
    """TILES from ENTRIES."""
    dtype_classes = dict.fromkeys(entry[0] for entry in entries)
    kernels = dict.fromkeys(entry[1] for entry in entries)
    found = {
        arch: {dtype_class: {kernel: [] for kernel in kernels} for dtype_class in dtype_classes}
        for arch in sorted({arch for entry in entries for arch in entry[4]})
    }
    for dtype_class, kernel, largest_d, tile, blocks in entries:
        for arch, count in blocks.items():
            found[arch][dtype_class][kernel].append((largest_d, (*tile, count)))
    for kernels in (kernels for dtype_classes in found.values() for kernels in dtype_classes.values()):
        for table in kernels.values():
            table.sort(key=lambda entry: (entry[0] is None, entry[0]))
    return found


TILES = tables(ENTRIES)
