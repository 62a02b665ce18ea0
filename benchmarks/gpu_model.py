"""The least time that each kernel needs on each card, from what the emulator counts: `python -m benchmarks.gpu_model`.

A launch on a small problem runs in the emulator (tests/gpu_emulation); what it counts is scaled by the entries of the
matrix of similarities, which is what the work grows with. Each count over the rate of its unit is a bound, and the
largest bound is the least time: no run of these kernels is faster, and how near one comes only a card can tell. With
--write the tables of docs/gpu.md are made anew, with what `make card` measured where benchmarks/results has it.
"""

import argparse
import functools
import json
import pathlib
from dataclasses import dataclass, replace

import torch

from benchmarks.results import replaced_between
from ssl_kernels.triton import sigmoid_pairs as triton_sigmoid_pairs
from tests.cuda import contrastive_calls, sigmoid_pairs_calls
from tests.gpu_emulation.runners import EmulatedGpu
from tests.support import sigmoid_pairs as pairs
from tests.support.contrastive import random_call
from tests.triton import contrastive_calls as triton_calls

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- tables: made by python -m benchmarks.gpu_model --write -->", "<!-- end of tables -->"
SECTOR = 32  # bytes


@dataclass(frozen=True)
class Card:
    """A card by its data sheet.

    Args:
        multiprocessors, clock: Clock in GHz, the boost clock.
        tensor: Dense bfloat16 operations with float32 sums, per clock and multiprocessor, by any instruction.
        by_mma: The part of `tensor` that mma.sync reaches: 1 up to compute capability 8.9; 0.63 on Hopper (Luo et al.,
            arXiv:2402.13499); taken to be Hopper's rate on Blackwell, whose own instruction is another.
        special: Exponentials per clock and multiprocessor. CUDA C++ Programming Guide, "Arithmetic Instructions".
        memory: Bandwidth in TB/s.
    """

    name: str
    multiprocessors: int
    clock: float
    tensor: int
    by_mma: float
    special: int
    memory: float

    def per_second(self, per_clock):
        return per_clock * self.multiprocessors * self.clock * 1e9


# Source: NVIDIA's data sheets and white papers of each card (A100 80 GB SXM, H100 and H200 SXM, B200, L4, RTX 4090).
CARDS = (
    Card("A100", 108, 1.41, 2048, 1.0, 16, 2.04),
    Card("H100", 132, 1.83, 4096, 0.63, 16, 3.35),
    Card("H200", 132, 1.83, 4096, 0.63, 16, 4.8),
    Card("B200", 148, 1.85, 8192, 0.315, 16, 8.0),
    Card("L4", 58, 2.04, 1024, 1.0, 16, 0.3),
    Card("RTX 4090", 128, 2.52, 512, 1.0, 16, 1.01),
)
BOUNDS = ("tensor", "shared", "L2", "special", "memory")
LIBRARY = 0.8  # of the tensor cores' peak, by cuBLAS
BANDWIDTH = 0.9  # of the data sheet's, by passes over memory
WGMMA = 1.0  # what of a card's peak wgmma and tcgen05 reach, and mma.sync on cards that have neither
L2_BYTES = 64  # per clock and multiprocessor, the width of its port
SHARED_WAVEFRONTS = 1  # per clock and multiprocessor
CUDA_BLOCK_ROWS = 4096  # of coefficients of two bytes, in csrc/cuda/coefficient_blocks.cuh
TRITON_PANEL_ROWS = 1024  # the same of 65536 columns, in ssl_kernels/triton/panels.py


@dataclass(frozen=True)
class Work:
    """What a loss' launches do per entry of its matrix of similarities, forward or backward.

    Args:
        operations: Of the tensor cores.
        wavefronts, sectors: Of shared memory; read and written through L2.
        special: Exponentials and reciprocals of the special-function units.
        memory: Bytes read and written that no cache holds.
        rate: The part of the tensor cores' peak that the products reach; None for mma.sync's.
    """

    operations: float
    wavefronts: float = 0.0
    sectors: float = 0.0
    special: float = 0.0
    memory: float = 0.0
    rate: float | None = None

    def seconds(self, card, entries):
        """{bound: seconds} on a card."""
        counts = {
            "tensor": (self.operations, card.tensor * (card.by_mma if self.rate is None else self.rate)),
            "shared": (self.wavefronts, SHARED_WAVEFRONTS),
            "L2": (self.sectors * SECTOR, L2_BYTES),
            "special": (self.special, card.special),
        }
        found = {name: entries * count / card.per_second(rate) for name, (count, rate) in counts.items()}
        return found | {"memory": entries * self.memory / (BANDWIDTH * 1e12 * card.memory)}


@dataclass(frozen=True)
class Case:
    """A loss at the sizes that users have.

    Args:
        name, rows, columns, width: bfloat16 rows; the matrix has rows x columns entries.
        works: {what: Work per entry}, one after the other.
        products: Units of 2 · rows · columns · width that plain PyTorch spends.
        passes: Times that plain PyTorch reads or writes the matrix of logits, in bfloat16.
    """

    name: str
    rows: int
    columns: int
    width: int
    works: dict
    products: int
    passes: int

    @property
    def entries(self):
        return self.rows * self.columns

    def plain_seconds(self, card):
        """The products by cuBLAS, and the passes over memory."""
        works = Work(self.products * 2 * self.width, rate=LIBRARY), Work(0, memory=2 * self.passes)
        return sum(max(work.seconds(card, self.entries).values()) for work in works)


@functools.cache
def gpu():
    return EmulatedGpu(90)


def _library(source):
    return gpu().cuda_library([ROOT / "csrc" / "cuda" / source])


def _work(launches, entries):
    total = {
        name: sum(getattr(launch.counters, name) for launch in launches) / entries
        for name in (
            "mma_flops",
            "shared_wavefronts",
            "special_functions",
            "global_load_sectors",
            "global_store_sectors",
        )
    }
    return Work(
        total["mma_flops"],
        total["shared_wavefronts"],
        total["global_load_sectors"] + total["global_store_sectors"],
        total["special_functions"],
    )


def _only(kernel, launches):
    """Those of a kernel: beside wide rows the passes over the rows alone are no small part of so small a problem."""
    return [one for one in launches if kernel in one.kernel]


def contrastive_work(n, m, d, *, both_directions=False, expectation=False):
    """Works of `contrastive` in CUDA on bfloat16 rows; m None: the square case, which has one gradient."""
    call = random_call(n, m, d, torch.bfloat16, both_directions=both_directions)
    upstream = call.upstream()
    library = _library("contrastive.cu")
    _, _, launches = contrastive_calls.run(library, call, upstream, splits=1, expectation=expectation)
    entries = n * (n if m is None else m)
    first = next(
        (i for i, one in enumerate(launches) if "bwd" in one.kernel or "coefficients" in one.kernel),
        len(launches),
    )
    works = {"forward": _work(launches[:first], entries)}
    if any("coefficients" in one.kernel for one in launches):
        works["forward"] = _work(_only("fwd_kernel", launches), entries)
        works["coefficients"] = _work(_only("coefficients_kernel", launches), entries)
        works["gradients by cuBLAS"] = _by_library(d, 1 if m is None else 2, CUDA_BLOCK_ROWS)
    elif not expectation:
        works["backward"] = _work(launches[first:], entries)
    return works


def sigmoid_work(n, d):
    """SigLIP's one pass on wide rows, which leaves the gradients too."""
    call = pairs.random_call(n, n, d, torch.bfloat16)
    _, _, launches = sigmoid_pairs_calls.total_with_gradients(_library("sigmoid_pairs.cu"), call, splits=1)
    return {
        "coefficients": _work(_only("coefficients_kernel", launches), n * n),
        "gradients by cuBLAS": _by_library(d, 2, CUDA_BLOCK_ROWS),
    }


def _by_library(d, gradients, block_rows):
    """Gradients by cuBLAS, from coefficients that are written once and read once for each.

    The sums of the columns, float32, are read and written with every block of rows; those of the rows stay in a cache,
    as their block of them is no larger than it.
    """
    sums = 2 * 4 * d / block_rows if gradients == 2 else 0
    return Work(gradients * 2 * d, memory=2 * (1 + gradients) + sums, rate=LIBRARY)


def wide_contrastive_work(n, m, d):
    """`contrastive` in Triton on wide bfloat16 rows, in both directions."""
    call = random_call(n, m, d, torch.bfloat16, both_directions=True, device=gpu().device)
    with gpu().triton() as launches:
        triton_calls.run(call)
    kernels = {
        "forward": ("contrastive_fwd_kernel", "merge_lse_kernel", "row_rnorm_kernel"),
        "coefficients": ("contrastive_coefficient_kernel",),
    }
    works = {
        part: replace(_work([one for one in launches if one.kernel in names], n * m), rate=WGMMA)
        for part, names in kernels.items()
    }
    return works | {"gradients by cuBLAS": _by_library(d, 2, TRITON_PANEL_ROWS)}


def wide_sigmoid_work(n, d):
    """`sigmoid_pairs` in Triton on wide bfloat16 rows."""
    call = pairs.random_call(n, n, d, torch.bfloat16)
    with gpu().triton() as launches:
        triton_sigmoid_pairs.sigmoid_pairs_fwd(*call.operands, True, True, True, True)
    ours = [one for one in launches if one.kernel == "sigmoid_coefficient_kernel"]
    coefficients = replace(_work(ours, n * n), rate=WGMMA)
    return {
        "coefficients": coefficients,
        "gradients by cuBLAS": _by_library(d, 2, TRITON_PANEL_ROWS),
    }


def cases():
    nt_xent, wide_nt_xent = contrastive_work(512, None, 128), contrastive_work(256, None, 512)
    clip = contrastive_work(256, 256, 512, both_directions=True)
    moco = contrastive_work(128, 512, 128, expectation=True)
    siglip = sigmoid_work(256, 768)
    wide_clip, wide_siglip = wide_contrastive_work(256, 256, 512), wide_sigmoid_work(256, 768)
    return [
        # Plain: logits; log_softmax read and write; its backward; the diagonal; scaled twice, forward and backward.
        Case("NT-Xent, 4096 pairs, D = 128", 8192, 8192, 128, nt_xent, 3, 12),
        Case("NT-Xent, 32768 pairs, D = 128", 65536, 65536, 128, nt_xent, 3, 12),
        Case("NT-Xent, 32768 pairs, D = 512", 65536, 65536, 512, wide_nt_xent, 3, 12),
        Case("CLIP, 65536 pairs, D = 512", 65536, 65536, 512, clip, 6, 20),
        Case("CLIP in Triton, 65536 pairs, D = 512", 65536, 65536, 512, wide_clip, 6, 20),
        Case("SigLIP, 65536 pairs, D = 768", 65536, 65536, 768, siglip, 3, 12),
        Case("SigLIP in Triton, 65536 pairs, D = 768", 65536, 65536, 768, wide_siglip, 3, 12),
        Case("MoCo, 256 against 65536, D = 128", 256, 65536, 128, moco, 2, 10),
    ]


def markdown(header, lines):
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def counts_table(all_cases):
    header = ["kernels", "units", "wavefronts per mma", "special functions", "sectors per 1000 entries"]
    lines = []
    for case in all_cases:
        if case.name == "NT-Xent, 32768 pairs, D = 128":
            continue  # the same kernels
        for part, work in case.works.items():
            mma = work.operations / 4096
            counted = (
                work.rate is None
            )  # wgmma reads shared memory by itself, which the emulator does not count
            lines.append(
                [
                    f"{case.name.split(',')[0]}, D = {case.width}, {part}",
                    f"{work.operations / (2 * case.width):.2f}",
                    f"{work.wavefronts / mma:.2f}" if counted else "",
                    f"{work.special:.2f}" if work.special else "",
                    f"{1000 * work.sectors:.0f}" if work.sectors else "",
                ]
            )
    return markdown(header, lines)


def times_table(all_cases, measured):
    header = ["", *[card.name for card in CARDS]]
    lines = []
    for case in all_cases:
        ours, binding, plain = [], [], []
        for card in CARDS:
            bounds = [work.seconds(card, case.entries) for work in case.works.values()]
            ours.append(sum(max(bound.values()) for bound in bounds))
            total = {name: sum(bound[name] for bound in bounds) for name in BOUNDS}
            binding.append(max(total, key=total.get))
            plain.append(case.plain_seconds(card))
        lines.append(
            [f"{case.name}, ms", *[f"{1e3 * t:.3g} ({b})" for t, b in zip(ours, binding, strict=True)]]
        )
        if " in Triton" not in case.name:  # the same as of the case before
            lines.append(["plain PyTorch, ms", *[f"{1e3 * t:.3g}" for t in plain]])
        if found := measured.get(case.name):
            lines.append(["measured, ms", *[found.get(card.name, "") for card in CARDS]])
    return markdown(header, lines)


def bounds_table(all_cases):
    """What each unit alone takes: the largest of a kernel is its part of the least time."""
    lines = []
    for case in all_cases:
        for bound in BOUNDS:
            totals = [
                sum(work.seconds(card, case.entries)[bound] for work in case.works.values()) for card in CARDS
            ]
            if any(totals):
                lines.append([f"{case.name}: {bound}, ms", *[f"{1e3 * total:.3g}" for total in totals]])
    return markdown(["", *[card.name for card in CARDS]], lines)


def measurements(folder=ROOT / "benchmarks" / "results"):
    """{case: {card: milliseconds}} of steps in card.json files, where the sizes are those of a case here."""
    keys = {
        "nt_xent B=4096 D=128 bfloat16": "NT-Xent, 4096 pairs, D = 128",
        "nt_xent B=32768 D=128 bfloat16": "NT-Xent, 32768 pairs, D = 128",
        "clip N=65536 D=512 bfloat16": "CLIP, 65536 pairs, D = 512",
        "moco N=256 K=65536 D=128 queue=bfloat16 ids=False bfloat16": "MoCo, 256 against 65536, D = 128",
    }
    found = {}
    for path in sorted(folder.glob("*/card.json")):
        record = json.loads(path.read_text())
        card = next((card.name for card in CARDS if card.name in (record["machine"]["gpu"] or "")), None)
        for finding in record["findings"]:
            step = (finding.get("result") or {}) if finding["section"] == "losses" else {}
            seconds = step.get("native", {}).get("step_seconds")
            if card and seconds and finding["name"] in keys:
                found.setdefault(keys[finding["name"]], {})[card] = f"{1e3 * seconds:.3g}"
    return found


def tables():
    """The three tables, as docs/gpu.md has them."""
    all_cases = cases()
    made = counts_table(all_cases), times_table(all_cases, measurements()), bounds_table(all_cases)
    return "\n\n".join(made)


def with_tables(page, made):
    """The text of the page with its tables replaced."""
    return replaced_between(page, BEGIN, END, f"\n\n{made}\n\n")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_model", description=__doc__)
    parser.add_argument("--write", action="store_true", help="into docs/gpu.md instead of to the terminal")
    options = parser.parse_args(argv)
    made = tables()
    if options.write:
        PAGE.write_text(with_tables(PAGE.read_text(), made))
    else:
        print(made)


if __name__ == "__main__":
    main()
