"""Times tiles on this machine's GPU and writes the fastest to tiles.py: python -m ssl_kernels.triton.tune.

Every time goes to a record at once, and what the record holds of this card is not timed again: a run that was cut off
goes on where it ended. Within a budget of minutes each entry has an equal share, spent on the tiles nearest to its own.
"""

import argparse
import functools
import itertools
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

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
KERNELS = ("forward", "expectation", "backward", "coefficient")
BLOCKS_N, BLOCKS_M, WARPS, STAGES = (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4)
BLOCKS_D = (16, 32, 64, 128)
WIDTH_OF_ANY = 512  # of vectors that an entry for every width is timed with


class Place(NamedTuple):
    """An entry of the table by where it stands, and the width of the vectors that it is timed with."""

    dtype_class: str
    kernel: str
    largest_d: int | None
    width: int


def places(table, dtype_classes=None, kernels=None, widths=None):
    """Places in the table of an architecture, of these dtype classes, kernels and widths; None is all of them.

    An entry that serves several of the widths is timed at the largest.
    """
    found = []
    for dtype_class, kernel in itertools.product(dtype_classes or DTYPES, kernels or KERNELS):
        below = 0
        for largest_d, _ in table[dtype_class][kernel]:
            end = math.inf if largest_d is None else largest_d
            served = [width for width in widths or () if below < width <= end]
            if widths is None:
                found.append(Place(dtype_class, kernel, largest_d, largest_d or WIDTH_OF_ANY))
            elif served:
                found.append(Place(dtype_class, kernel, largest_d, max(served)))
            below = end
    return found


def candidates(kernel, largest_d, entry):
    """Tiles to try for a kernel and the widths up to largest_d (None: any), those nearest to its entry first."""
    whole_d = kernel in ("forward", "expectation", "backward") and largest_d is not None
    blocks_d = (largest_d,) if whole_d else BLOCKS_D
    # A block of 1 fits any multiprocessor that runs it; tests/triton/test_tiles.py says how many really do.
    found = (
        Tile(*sizes, blocks=1) for sizes in itertools.product(BLOCKS_N, BLOCKS_M, blocks_d, WARPS, STAGES)
    )

    def steps(tile):
        factors = sum(abs(math.log2(ours / its)) for ours, its in zip(tile[:4], entry[:4], strict=True))
        return factors + abs(tile.num_stages - entry.num_stages)

    return sorted((tile for tile in found if tile[:5] != entry[:5]), key=steps)


class Record:
    """Times by place and tile, in milliseconds or the reason why there is none; a line of JSON each in a file.

    `timer(place, tile)` is asked for (milliseconds, None) or (None, the reason) of what the file does not hold of this
    machine.
    """

    def __init__(self, path, machine, timer):
        self.path, self.machine, self.timer, self.times = path, machine, timer, {}
        if path.exists():
            for line in path.read_text().splitlines():
                entry = json.loads(line)
                if entry["machine"] == machine:
                    self.times[Place(*entry["place"]), tuple(entry["tile"])] = entry["ms"], entry["error"]

    def timed(self, place, tile):
        """Milliseconds of a tile in a place, infinite where it cannot run."""
        key = place, tuple(tile[:5])
        if key not in self.times:
            ms, error = self.timer(place, tile)
            self.times[key] = ms, error
            entry = {"machine": self.machine, "place": place, "tile": key[1], "ms": ms, "error": error}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps(entry) + "\n")
        ms, _ = self.times[key]
        return math.inf if ms is None else ms


def time_tile(arch, place, tile):
    """(milliseconds, None) of a call with this tile in this place, or (None, why it cannot run)."""
    import triton

    from ssl_kernels.triton import contrastive

    dtype_class, kernel, _, width = place
    table = tiles.TILES[arch][dtype_class]
    kept = dict(table)
    table[kernel] = [(None, tile)]
    if kernel == "coefficient":
        table["backward"] = []
    torch.backends.cuda.matmul.fp32_precision = "tf32" if dtype_class == "tf32" else "ieee"
    try:
        rows = torch.randn(ROWS, width, device=DEVICE).to(DTYPES[dtype_class])
        acc = torch.float64 if dtype_class == "float64" else torch.float32
        scale = torch.tensor(10.0, device=DEVICE, dtype=acc)
        positives = (torch.arange(ROWS, device=DEVICE) + ROWS // 2) % ROWS
        operands = (rows, None, scale, positives, None, None)
        flags = (True, True, False, False)
        if kernel == "expectation":
            queue = (rows, rows, scale, None, None, None)
            call = lambda: contrastive.contrastive_fwd(*queue, True, False, False, False, True, False)  # noqa: E731
        else:
            call = lambda: contrastive.contrastive_fwd(*operands, *flags, True, True)  # noqa: E731
        if kernel in ("backward", "coefficient"):
            lse, column_lse, positive_logits, *saved = call()
            gradients = (torch.ones_like(lse), None, -torch.ones_like(positive_logits))
            arguments = (*gradients, *operands, lse, column_lse, *saved, *flags, True, False)
            call = lambda: contrastive.contrastive_bwd(*arguments)  # noqa: E731
        return triton.testing.do_bench(call), None
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None, "out of memory"
    except triton.errors.TritonError as error:  # more than a block can have, or nothing the compiler can make
        return None, type(error).__name__
    except RuntimeError as error:
        if "PassManager" not in str(error):  # the compiler's passes have no error of their own
            raise
        return None, "the compiler's passes failed"
    finally:
        table.update(kept)
        torch.backends.cuda.matmul.fp32_precision = "none"


def best_tile(place, entry, timed, deadline):
    """The fastest tile of a place, its time and that of its entry, and how many were tried before the deadline.

    `timed(place, tile)` gives milliseconds. The entry is timed in any case.
    """
    before = timed(place, entry)
    best, shortest, tried = entry, before, 1
    for tile in candidates(place.kernel, place.largest_d, entry):
        if time.monotonic() >= deadline:
            break
        ms = timed(place, tile)
        tried += 1
        if ms < shortest:
            best, shortest = tile, ms
    return best, shortest, before, tried


def entries_source(table):
    """The list ENTRIES of tiles.py for a table like TILES."""
    blocks = {}
    for arch, dtype_classes in table.items():
        for dtype_class, kernels in dtype_classes.items():
            for kernel, entries in kernels.items():
                for largest_d, tile in entries:
                    key = dtype_class, kernel, largest_d, tuple(tile[:5])
                    blocks.setdefault(key, {})[arch] = tile[5]
    places = [f"{dtype_class} {kernel}" for dtype_class in DTYPES for kernel in KERNELS]

    def order(key):
        dtype_class, kernel, largest_d, _ = key
        return places.index(f"{dtype_class} {kernel}"), largest_d is None, largest_d or 0, min(blocks[key])

    lines = (
        json.dumps([*key[:2]])[1:-1] + f", {key[2]}, {key[3]}, {blocks[key]}"
        for key in sorted(blocks, key=order)
    )
    return "ENTRIES = [\n" + "".join(f"    ({line}),\n" for line in lines) + "]\n"


def table_source(table):
    """tiles.py with `table` in place of its own."""
    source = Path(tiles.__file__).read_text()
    head, rest = source.split("ENTRIES = [\n")
    return head + entries_source(table) + rest.split("\n]\n", 1)[1]


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m ssl_kernels.triton.tune", description=__doc__)
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="only these dtype classes")
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="only these kernels")
    parser.add_argument("--width", type=int, action="append", help="only entries that serve these widths")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end after about so many (default: never)"
    )
    parser.add_argument(
        "--record", type=Path, default=Path("out/tiles_timed.jsonl"), help="times, kept between runs"
    )
    parser.add_argument("--output", type=Path, default=Path(tiles.__file__), help="where to write the table")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("tune: timing tiles needs a CUDA GPU, and torch sees none")
    import triton

    from ssl_kernels.triton.launch import table_arch

    major, minor = torch.cuda.get_device_capability()
    arch = table_arch(10 * major + minor)
    machine = [torch.cuda.get_device_name(), torch.__version__, triton.__version__, ROWS]
    record = Record(options.record, machine, functools.partial(time_tile, arch))
    end = time.monotonic() + 60 * options.minutes
    table = tiles.TILES[arch]
    chosen = places(table, options.dtype, options.kernel, options.width)
    print(f"{machine[0]}: {len(chosen)} entries of architecture {arch}, {len(record.times)} times on record")
    for number, place in enumerate(chosen):
        now = time.monotonic()
        if now >= end:
            print(f"{len(chosen) - number} entries are left")
            break
        deadline = now + (end - now) / (len(chosen) - number)
        entries = table[place.dtype_class][place.kernel]
        index = [largest_d for largest_d, _ in entries].index(place.largest_d)
        tile, ms, before, tried = best_tile(place, Tile(*entries[index][1]), record.timed, deadline)
        print(
            f"{place.dtype_class} {place.kernel} {place.largest_d}: {before:.3f} -> {ms:.3f} ms"
            f" {tuple(tile)}, of {tried} tiles",
            flush=True,
        )
        entries[index] = place.largest_d, tile
        options.output.write_text(table_source(tiles.TILES))
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
