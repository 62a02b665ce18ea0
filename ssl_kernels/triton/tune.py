"""Times tiles on this machine's GPU and writes the fastest to tiles.py: python -m ssl_kernels.triton.tune."""

import argparse
import itertools
import pprint
import sys
from pathlib import Path

import torch

from ssl_kernels.triton import tiles
from ssl_kernels.triton.tiles import Tile

# Rows, or pairs of views, that a call is timed with: enough to fill a card, and columns to walk.
ROWS = 8192
DEVICE = "cuda"
DTYPES = {
    "half": torch.bfloat16,
    "float32": torch.float32,
    "tf32": torch.float32,
    "float64": torch.float64,
}
BLOCKS_N, BLOCKS_M, WARPS, STAGES = (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
BLOCKS_D = (16, 32, 64, 128)


def candidates(kernel, largest_d):
    """Tiles to try for a kernel and the widths up to largest_d (None: any)."""
    whole_d = kernel in ("forward", "expectation", "backward") and largest_d is not None
    blocks_d = (largest_d,) if whole_d else BLOCKS_D
    # A block of 1 fits any multiprocessor that runs it; tests/triton/test_tiles.py says how many really do.
    for sizes in itertools.product(BLOCKS_N, BLOCKS_M, blocks_d, WARPS, STAGES):
        yield Tile(*sizes, blocks=1)


def best_tile(kernel, arch, dtype_class, largest_d, entry):
    """The fastest tile for the place of `entry` in the table, its time and that of `entry`, in ms."""
    import triton

    from ssl_kernels.triton import contrastive

    d = 512 if largest_d is None else largest_d
    rows = torch.randn(ROWS, d, device=DEVICE).to(DTYPES[dtype_class])
    acc = torch.float64 if dtype_class == "float64" else torch.float32
    scale = torch.tensor(10.0, device=DEVICE, dtype=acc)
    positives = (torch.arange(ROWS, device=DEVICE) + ROWS // 2) % ROWS
    operands = (rows, None, scale, positives, None, None)
    flags = (True, True, False, False)
    table = tiles.TILES[arch][dtype_class]
    present = table[kernel]

    def milliseconds(tile):
        table[kernel] = [(None, tile)]
        try:
            if kernel == "expectation":
                queue = (rows, rows, scale, None, None, None)
                return triton.testing.do_bench(
                    lambda: contrastive.contrastive_fwd(*queue, True, False, False, False, True, False)
                )
            lse, column_lse, positive_logits, *saved = contrastive.contrastive_fwd(
                *operands, *flags, True, True
            )
            gradients = (torch.ones_like(lse), None, -torch.ones_like(positive_logits))
            saved = (lse, column_lse, *saved)
            if kernel == "forward":
                return triton.testing.do_bench(
                    lambda: contrastive.contrastive_fwd(*operands, *flags, True, True)
                )
            return triton.testing.do_bench(
                lambda: contrastive.contrastive_bwd(*gradients, *operands, *saved, *flags, True, False)
            )
        except triton.errors.TritonError:  # more than a block can have, or nothing the compiler can make
            return float("inf")
        except RuntimeError as error:
            if "PassManager" not in str(error):  # the compiler's passes have no error of their own
                raise
            return float("inf")
        finally:
            table[kernel] = present

    if kernel in ("coefficient", "product"):
        table["backward"], hidden = [], table["backward"]
    before = milliseconds(entry)
    timed = [(milliseconds(tile), tile) for tile in candidates(kernel, largest_d)]
    if kernel in ("coefficient", "product"):
        table["backward"] = hidden
    time, tile = min([(before, entry), *timed])
    return tile, time, before


def table_source(table):
    """tiles.py with `table` in place of its own."""
    source = Path(tiles.__file__).read_text()
    head = source[: source.index("TILES = ")]
    plain = {
        arch: {
            dtype_class: {
                kernel: [(d, tuple(tile)) for d, tile in entries] for kernel, entries in kernels.items()
            }
            for dtype_class, kernels in dtype_classes.items()
        }
        for arch, dtype_classes in table.items()
    }
    return head + "TILES = " + pprint.pformat(plain, width=110, sort_dicts=False) + "\n"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m ssl_kernels.triton.tune", description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="only these dtype classes")
    parser.add_argument("--output", type=Path, default=Path(tiles.__file__), help="where to write the table")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("tune: timing tiles needs a CUDA GPU, and torch sees none")

    from ssl_kernels.triton.launch import table_arch

    major, minor = torch.cuda.get_device_capability()
    arch = table_arch(10 * major + minor)
    print(f"{torch.cuda.get_device_name()}: entries of architecture {arch}")
    for dtype_class in options.dtype or DTYPES:
        torch.backends.cuda.matmul.allow_tf32 = dtype_class == "tf32"
        for kernel, entries in tiles.TILES[arch][dtype_class].items():
            tuned = []
            for largest_d, entry in entries:
                tile, time, before = best_tile(kernel, arch, dtype_class, largest_d, Tile(*entry))
                print(f"{dtype_class} {kernel} {largest_d}: {before:.3f} -> {time:.3f} ms {tuple(tile)}")
                tuned.append((largest_d, tile))
            tiles.TILES[arch][dtype_class][kernel] = tuned
    options.output.write_text(table_source(tiles.TILES))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
