"""Volume and time of the losses over many GPUs, on paper: gather, ring and half ring. No GPU was measured for it.

    python -m benchmarks.distributed_model [--out docs/distributed_model.md]

The bytes are those that tests/distributed/test_traffic.py counts. The times follow from them and from the assumptions
below, which a reader may change.
"""

import argparse
import math
import pathlib
from dataclasses import dataclass

LSE = 8  # bytes of a log-sum-exp or of its gradient: float64


@dataclass(frozen=True)
class Load:
    """What one rank sends in one step, in bytes, and when.

    Attributes:
        forward, backward: Bytes that a rank sends.
        transfers: How many transfers or collectives follow one another, forward and backward together.
    """

    forward: int
    backward: int
    transfers: int

    @property
    def total(self):
        return self.forward + self.backward


def gather(world, rows, dim, itemsize, acc):
    """Columns by an all-gather, sums by an all-to-all and, backward, a gather; gradients by a reduce-scatter."""
    others = (world - 1) * rows
    return Load(
        forward=others * (dim * itemsize + LSE),
        backward=others * (2 * LSE + dim * acc),
        transfers=4,
    )


def ring(world, rows, dim, itemsize, acc):
    """Columns go round once forward and once backward, with their sums and gradients one transfer behind, and home."""
    return Load(
        forward=rows * ((world - 1) * dim * itemsize + world * LSE),
        backward=rows * ((world - 1) * (dim * itemsize + 2 * LSE) + world * dim * acc),
        transfers=2 * world,
    )


def half_ring(world, rows, dim, itemsize, acc):
    """Blocks go half way round, and their parts straight home from there."""
    half = world // 2
    return Load(
        forward=rows * half * (dim * itemsize + LSE),
        backward=rows * half * (dim * itemsize + 2 * LSE + dim * acc),
        transfers=2 * (half + 1),
    )


@dataclass(frozen=True)
class Machine:
    """The assumptions.

    Attributes:
        operations: Products a second and GPU, of what the kernels reach (half of an H100's bfloat16 peak).
        bandwidth: Bytes a second that a GPU sends over the network (400 Gbit/s each).
        latency: Seconds to begin one transfer; a collective takes log2(W) of them.
    """

    operations: float = 4.9e14
    bandwidth: float = 50e9
    latency: float = 10e-6


def nt_xent_seconds(strategy, world, batch, dim, machine, itemsize=2, acc=4):
    """(seconds, load) of NT-Xent forward and backward: 2B rows, 2 units of work divided by W whatever the strategy.

    A gather is waited for, though its own rows' products overlap with it; a ring computes while the next block
    travels, and the longer of the two counts.
    """
    rows = 2 * batch // world
    compute = 2 * 2 * (2 * batch) ** 2 * dim / world / machine.operations
    if strategy == "gather":
        load = gather(world, rows, dim, itemsize, acc)
        seconds = (
            load.transfers * machine.latency * math.log2(world) + load.total / machine.bandwidth + compute
        )
        return seconds, load
    if strategy == "ring":  # every block meets every other: each pair is multiplied twice
        load, compute = ring(world, rows, dim, itemsize, acc), 2 * compute
    else:
        load = half_ring(world, rows, dim, itemsize, acc)
    return max(compute, load.total / machine.bandwidth) + load.transfers * machine.latency, load


def memory(strategy, world, batch, dim, itemsize=2, acc=4):
    """Bytes a rank holds beyond its inputs and gradients."""
    rows = 2 * batch // world
    if strategy == "gather":
        return 2 * batch * (dim * (itemsize + acc) + 3 * LSE)
    return rows * (3 * dim * (itemsize + acc) + 8 * LSE)


def table(machine=None):
    """The document that is written."""
    machine, dim = machine or Machine(), 512
    lines = [
        "# Gather, ring and half ring on paper",
        "",
        "Written by `python -m benchmarks.distributed_model --out docs/distributed_model.md`. NT-Xent, forward and",
        f"backward, bfloat16 rows of width {dim}, gradients travelling in float32. Assumed:"
        f" {machine.operations / 1e12:.0f} TFLOP/s a GPU,",
        f"{machine.bandwidth / 1e9:.0f} GB/s a GPU over the network, {machine.latency * 1e6:.0f} µs a transfer"
        " (log2 W of them a collective), no other traffic, no faster links",
        "inside a node; a gather is waited for (that it overlaps with the own rows' products, a W-th of all, is not",
        "counted), a ring computes meanwhile. tests/distributed/test_traffic.py counts the bytes; no time here was",
        "measured.",
        "",
        "A cell: bytes per rank sends / milliseconds / bytes per rank holds beyond inputs and gradients.",
        "",
        "| GPUs | pairs | gather | ring | half ring |",
        "|---|---|---|---|---|",
    ]
    for world in (8, 64, 512, 4096):
        for batch in (1 << 15, 1 << 18, 1 << 22):
            cells = []
            for strategy in ("gather", "ring", "half ring"):
                seconds, load = nt_xent_seconds(strategy, world, batch, dim, machine)
                held = memory(strategy, world, batch, dim)
                cells.append(f"{_bytes(load.total)} / {seconds * 1e3:.3g} / {_bytes(held)}")
            lines.append(f"| {world} | {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _bytes(count):
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}"
        count /= 1000


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, help="write there instead of printing")
    options = parser.parse_args(arguments)
    if options.out is None:
        print(table(), end="")
    else:
        options.out.write_text(table())


if __name__ == "__main__":
    main()
