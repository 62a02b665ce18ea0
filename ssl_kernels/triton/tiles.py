"""Tiles of the Triton kernels: TILES[architecture][dtype class][kernel] = [(largest D, tile), ...].

Plain data, so that nothing is tuned at import; `python -m ssl_kernels.triton.tune` times candidates on a card
and writes this file anew. The first entry whose largest D covers D counts, None covers every D. A D that no
entry of "backward" covers takes "coefficient" and "product" instead.

Architectures: 80 (A100), 86 (also 8.7, 8.8, 8.9 and 12.x: a hundred KB of shared memory), 90 (H100), 100 (B200).
Dtype classes: half (float16, bfloat16), float32, tf32 (float32 where torch allows TF32), float64.

    expectation             the forward that also sums columns: a block_n × block_d accumulator, block_d covers D;
                            sigmoid_pairs takes these tiles too
    forward, coefficient    block_n rows × block_m columns of logits, block_d features at a time
    backward                the same, and a block_n × block_d accumulator: block_d covers D
    product                 block_n × block_d of the result, block_m of the inner dimension at a time

blocks is how many blocks fit a multiprocessor at once at least, by registers, shared memory and threads; no
entry spills a register. tests/triton/test_tiles.py holds every entry to both.
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


# The width, by bytes an element, up to which every card has an "expectation" tile.
WIDEST_EXPECTATION = {2: 256, 4: 256, 8: 128}


def keeps_expectation(rows):
    """Whether the forward has a tile that holds the expectation of the columns beside the logits, on any card."""
    return rows.shape[1] <= WIDEST_EXPECTATION[rows.element_size()]


TILES = {
    80: {
        "half": {
            "forward": [
                (16, (128, 64, 16, 8, 3, 1)),
                (32, (128, 64, 32, 8, 3, 1)),
                (64, (128, 64, 64, 8, 3, 1)),
                (128, (128, 64, 128, 8, 3, 1)),
                (256, (128, 64, 256, 8, 2, 1)),
                (None, (128, 64, 64, 8, 3, 1)),
            ],
            "expectation": [
                (16, (64, 32, 16, 4, 2, 3)),
                (32, (128, 32, 32, 8, 2, 1)),
                (64, (128, 32, 64, 8, 2, 1)),
                (128, (128, 16, 128, 8, 2, 1)),
                (256, (64, 16, 256, 8, 2, 1)),
            ],
            "backward": [
                (16, (128, 32, 16, 8, 2, 2)),
                (32, (128, 32, 32, 8, 2, 1)),
                (64, (128, 32, 64, 8, 2, 1)),
                (128, (128, 16, 128, 8, 2, 1)),
            ],
            "coefficient": [(None, (128, 64, 64, 8, 3, 2))],
            "product": [(None, (128, 64, 64, 8, 3, 1))],
        },
        "float32": {
            "forward": [(None, (64, 32, 16, 4, 2, 3))],
            "expectation": [
                (32, (32, 16, 32, 4, 1, 1)),
                (64, (16, 32, 64, 4, 1, 1)),
                (128, (32, 16, 128, 4, 1, 1)),
                (256, (32, 16, 256, 8, 1, 2)),
            ],
            "backward": [],
            "coefficient": [(None, (64, 64, 16, 4, 2, 4))],
            "product": [(None, (64, 16, 64, 4, 2, 2))],
        },
        "tf32": {
            "forward": [(None, (64, 64, 32, 4, 3, 2))],
            "expectation": [
                (64, (64, 32, 64, 4, 1, 1)),
                (128, (32, 32, 128, 4, 1, 1)),
                (256, (32, 16, 256, 8, 1, 1)),
            ],
            "backward": [],
            "coefficient": [(None, (64, 64, 32, 4, 3, 4))],
            "product": [(None, (64, 32, 64, 4, 3, 2))],
        },
        "float64": {
            "forward": [(None, (32, 16, 32, 4, 2, 3))],
            "expectation": [
                (64, (16, 16, 64, 4, 1, 1)),
                (128, (16, 16, 128, 4, 1, 1)),
            ],
            "backward": [],
            "coefficient": [(None, (32, 16, 16, 4, 2, 7))],
            "product": [(None, (32, 16, 32, 4, 2, 7))],
        },
    },
    86: {
        "half": {
            "forward": [
                (16, (128, 64, 16, 8, 3, 1)),
                (32, (128, 64, 32, 8, 3, 1)),
                (64, (128, 64, 64, 8, 3, 1)),
                (128, (128, 64, 128, 8, 3, 1)),
                (None, (128, 64, 64, 8, 3, 1)),
            ],
            "expectation": [
                (16, (64, 32, 16, 4, 2, 3)),
                (32, (128, 32, 32, 8, 2, 1)),
                (64, (128, 32, 64, 8, 2, 1)),
                (128, (128, 16, 128, 8, 2, 1)),
                (256, (64, 16, 256, 8, 2, 1)),
            ],
            "backward": [
                (16, (128, 32, 16, 8, 2, 1)),
                (32, (128, 32, 32, 8, 2, 1)),
                (64, (128, 32, 64, 8, 2, 1)),
                (128, (128, 16, 128, 8, 2, 1)),
            ],
            "coefficient": [(None, (128, 64, 64, 8, 3, 2))],
            "product": [(None, (128, 64, 64, 8, 3, 1))],
        },
        "float32": {
            "forward": [(None, (64, 32, 16, 4, 2, 1))],
            "expectation": [
                (32, (32, 32, 32, 4, 1, 1)),
                (64, (32, 16, 64, 8, 1, 1)),
                (128, (32, 16, 128, 4, 1, 1)),
                (256, (16, 16, 256, 4, 1, 1)),
            ],
            "backward": [],
            "coefficient": [(None, (64, 64, 16, 4, 2, 1))],
            "product": [(None, (64, 16, 64, 4, 2, 1))],
        },
        "tf32": {
            "forward": [(None, (64, 64, 32, 4, 3, 2))],
            "expectation": [
                (64, (64, 32, 64, 4, 1, 1)),
                (128, (64, 32, 128, 4, 1, 1)),
                (256, (32, 16, 256, 8, 1, 1)),
            ],
            "backward": [],
            "coefficient": [(None, (64, 64, 32, 4, 3, 1))],
            "product": [(None, (64, 32, 64, 4, 3, 1))],
        },
        "float64": {
            "forward": [(None, (32, 16, 16, 4, 2, 1))],
            "expectation": [
                (64, (16, 16, 64, 4, 1, 1)),
                (128, (16, 16, 128, 8, 1, 1)),
            ],
            "backward": [],
            "coefficient": [(None, (32, 16, 16, 4, 2, 1))],
            "product": [(None, (32, 16, 32, 4, 2, 1))],
        },
    },
    90: {
        "half": {
            "forward": [
                (16, (128, 64, 16, 8, 3, 1)),
                (32, (128, 64, 32, 8, 3, 1)),
                (64, (128, 64, 64, 8, 3, 1)),
                (128, (128, 64, 128, 8, 3, 1)),
                (256, (128, 64, 256, 8, 2, 1)),
                (None, (128, 64, 64, 8, 3, 1)),
            ],
            "expectation": [
                (16, (128, 32, 16, 8, 2, 1)),
                (32, (128, 32, 32, 8, 2, 1)),
                (64, (128, 32, 64, 8, 2, 1)),
                (128, (128, 32, 128, 8, 2, 1)),
                (256, (64, 16, 256, 8, 2, 1)),
            ],
            "backward": [
                (16, (128, 32, 16, 8, 2, 1)),
                (32, (128, 32, 32, 8, 2, 1)),
                (64, (128, 32, 64, 8, 2, 1)),
                (128, (128, 32, 128, 8, 2, 1)),
                (256, (64, 16, 256, 8, 2, 1)),
            ],
            "coefficient": [(None, (128, 64, 64, 8, 3, 2))],
            "product": [(None, (128, 64, 64, 8, 3, 1))],
        },
        "float32": {
            "forward": [(None, (32, 32, 16, 4, 2, 3))],
            "expectation": [
                (32, (32, 32, 32, 4, 1, 1)),
                (64, (16, 32, 64, 4, 1, 1)),
                (128, (32, 64, 128, 8, 1, 1)),
                (256, (32, 16, 256, 8, 1, 2)),
            ],
            "backward": [],
            "coefficient": [(None, (64, 64, 16, 4, 2, 4))],
            "product": [(None, (64, 16, 64, 4, 2, 3))],
        },
        "tf32": {
            "forward": [(None, (64, 64, 32, 4, 3, 3))],
            "expectation": [
                (64, (64, 32, 64, 4, 1, 1)),
                (128, (32, 32, 128, 4, 1, 1)),
                (256, (32, 16, 256, 8, 1, 1)),
            ],
            "backward": [],
            "coefficient": [(None, (64, 64, 32, 4, 3, 3))],
            "product": [(None, (64, 32, 64, 4, 3, 2))],
        },
        "float64": {
            "forward": [(None, (32, 16, 32, 4, 2, 3))],
            "expectation": [
                (64, (16, 32, 64, 4, 1, 1)),
                (128, (16, 16, 128, 8, 1, 1)),
            ],
            "backward": [],
            "coefficient": [(None, (16, 32, 16, 4, 2, 7))],
            "product": [(None, (32, 16, 32, 4, 2, 6))],
        },
    },
    100: {
        "half": {
            "forward": [
                (16, (128, 64, 16, 8, 3, 1)),
                (32, (128, 64, 32, 8, 3, 1)),
                (64, (128, 64, 64, 8, 3, 1)),
                (128, (128, 64, 128, 8, 3, 1)),
                (256, (128, 64, 256, 8, 2, 1)),
                (None, (128, 64, 64, 8, 3, 1)),
            ],
            "expectation": [
                (32, (64, 32, 32, 4, 2, 2)),
                (64, (64, 32, 64, 4, 2, 2)),
                (128, (128, 32, 128, 8, 2, 1)),
                (256, (64, 16, 256, 8, 2, 1)),
            ],
            "backward": [
                (32, (128, 32, 32, 8, 2, 1)),
                (64, (128, 32, 64, 8, 2, 1)),
                (128, (128, 32, 128, 8, 2, 1)),
                (256, (64, 16, 256, 8, 2, 1)),
            ],
            "coefficient": [(None, (128, 64, 64, 8, 3, 1))],
            "product": [(None, (128, 64, 64, 8, 3, 1))],
        },
        "float32": {
            "forward": [(None, (32, 32, 16, 4, 2, 3))],
            "expectation": [
                (32, (32, 32, 32, 4, 1, 1)),
                (64, (16, 32, 64, 4, 1, 1)),
                (128, (32, 16, 128, 4, 1, 1)),
                (256, (16, 16, 256, 8, 1, 1)),
            ],
            "backward": [],
            "coefficient": [(None, (64, 64, 16, 4, 2, 4))],
            "product": [(None, (64, 16, 64, 4, 2, 3))],
        },
        "tf32": {
            "forward": [(None, (64, 64, 32, 4, 3, 2))],
            "expectation": [
                (64, (64, 32, 64, 8, 1, 2)),
                (128, (32, 32, 128, 4, 1, 1)),
                (256, (32, 16, 256, 8, 1, 1)),
            ],
            "backward": [],
            "coefficient": [(None, (64, 64, 32, 4, 3, 2))],
            "product": [(None, (64, 32, 64, 4, 3, 3))],
        },
        "float64": {
            "forward": [(None, (32, 16, 16, 4, 2, 3))],
            "expectation": [
                (64, (16, 16, 64, 4, 1, 1)),
                (128, (16, 16, 128, 8, 1, 1)),
            ],
            "backward": [],
            "coefficient": [(None, (32, 16, 16, 4, 2, 8))],
            "product": [(None, (32, 16, 32, 4, 2, 8))],
        },
    },
}
