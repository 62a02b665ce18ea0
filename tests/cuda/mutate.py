"""Breaks the CUDA kernels of `contrastive`, one barrier, wait or mask at a time: which check notices?

    python -m tests.cuda.mutate [--list] [NAME ...]

Works on a copy of csrc/cuda, compiled for emulated sm_80 with half and float32 only. Every mutation must be
noticed: the exit code is 1 if one was not.
"""

import argparse
import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from tests.cuda.parity import check_parity, random_call
from tests.gpu_emulation import EmulatedCudaLibrary, PtxError

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
KERNELS, LAUNCHERS = "contrastive.cuh", "contrastive.cu"
WALK, ROWS, TILE, WARP = "tile_walk.cuh", "rows.cuh", "device/tile.cuh", "device/warp.cuh"


class Mutation(NamedTuple):
    """The nth occurrence (from 0) of `old` in `file` becomes `new`."""

    name: str
    file: str
    old: str
    new: str = ""
    nth: int = 0


WAIT, BARRIER, COMMIT = "copy_async_wait<kStages - 2>();", "__syncthreads();", "copy_async_commit();"

MUTATIONS = [
    Mutation("walk: wait for the step's copies", WALK, WAIT),
    Mutation("walk: barrier of a step", WALK, BARRIER),
    Mutation("walk: commit of a step's copies", WALK, COMMIT),
    Mutation("walk: barrier of a step of G", WALK, "step();", "copy_async_wait<kStages - 2>(); load_next();", 1),
    Mutation("block sum: barrier", WARP, BARRIER, nth=0),
    Mutation("block maximum: barrier", WARP, BARRIER, nth=1),
    Mutation("walk: prefetch one step less",
             WALK, "step < kStages - 1; ++step", "step < kStages - 2; ++step"),
    Mutation("tile copy: row mask", TILE, "row0 + r < rows && "),
    Mutation("tile copy: depth mask", TILE, " && column < columns"),
    Mutation("walk: column mask of the terms", WALK, "valid = j < other_.count;", "valid = true;"),
    Mutation("forward: row mask of the norms", KERNELS, "own.rnorm && row < own.count", "own.rnorm"),
    Mutation("backward: row mask of the terms", KERNELS, "valid = i < own.count;", "valid = true;"),
    Mutation("forward: row mask of the results",
             KERNELS, "lane % 4 == 0 && row < own.count", "lane % 4 == 0"),
    Mutation("forward: one lane a row", KERNELS, "lane % 4 == 0 && row < own.count", "row < own.count"),
    Mutation("walk: row mask of the product", WALK, "row < own_.count && d < width_", "d < width_"),
    Mutation("walk: depth mask of the product", WALK, "row < own_.count && d < width_", "row < own_.count"),
    Mutation("forward: excluded entries", KERNELS, "exclude<kNTiles>", "if (false) exclude<kNTiles>", 0),
    Mutation("backward: excluded entries", KERNELS, "exclude<kNTiles>", "if (false) exclude<kNTiles>", 1),
    Mutation("excluded: columns past the end", KERNELS, "if (j >= problem.other.count) return false;"),
    Mutation("excluded: the diagonal", KERNELS, "!problem.square && (", "("),
    Mutation("excluded: the diagonal kept", KERNELS, "problem.keep_diagonal || ", ""),
    Mutation("excluded: equal ids", KERNELS, "return !problem.own.ids || id_i != id_j;", "return true;"),
    Mutation("excluded: tiles on the diagonal", KERNELS, "!on_diagonal && ", ""),
    Mutation("excluded: tiles with ids", KERNELS, "&& !own.ids ", ""),
    Mutation("excluded: tiles past the end", KERNELS, " && column0 + kColumns <= other.count", ""),
    Mutation("ids: bound", KERNELS, "side.ids && index < side.count", "side.ids"),
    Mutation("positives: source mask", KERNELS, "base + lane < sources && source < from.count", "true"),
    Mutation("positives: target from the end", KERNELS, "if (valid && target < 0) target += to.count;"),
    Mutation("positives: lower bound", KERNELS, "target >= 0 && target < targets", "target < targets"),
    Mutation("positives: upper bound", KERNELS, "target >= 0 && target < targets", "target >= 0"),
    Mutation("positives: one lane an entry", KERNELS, "if (!holds_element(row, column)) return;"),
    Mutation("preparation: row mask", ROWS, "if (row >= count) return;", "", 0),
    Mutation("preparation: zero padding",
             ROWS, "d < D ? x[d * column_stride] : from_acc<scalar_t>(acc_t(0))", "x[d * column_stride]"),
    Mutation("preparation: shortest norm",
             ROWS, "norm < Math<acc_t>::kNormEps ? Math<acc_t>::kNormEps : norm", "norm"),
    Mutation("merge: row mask", KERNELS, "if (row >= count) return;", "", 0),
    Mutation("terms: row mask", KERNELS, "if (row >= count) return;", "", 1),
    Mutation("finish: row mask", ROWS, "if (row >= count) return;", "", 1),
    Mutation("finish: no projection of tiny rows",
             ROWS, "rnorm && factor < acc_t(1) / Math<acc_t>::kNormEps", "rnorm"),
    Mutation("half: zero rows' norms", ROWS, "rnorm.value[e] > acc_t(kZeroRowRnorm) ? acc_t(0) : ", ""),
    Mutation("half: scale taken out again",
             ROWS, "coefficient_scale ? acc_t(1) / *coefficient_scale : ", ""),
    Mutation("expectation: barrier of the maxima", KERNELS, BARRIER, nth=0),
    Mutation("expectation: barrier of the sums", KERNELS, BARRIER, nth=1),
    Mutation("expectation: rising maximum", KERNELS, "if (__any_sync(kAllLanes, shrinks))", "if (false)"),
    Mutation("expectation: excluded entries", KERNELS, "exclude<kNTiles>", "if (false) exclude<kNTiles>", 2),
    Mutation("expectation: row mask of the norms",
             KERNELS, "own.rnorm && row < own.count", "own.rnorm", 1),
    Mutation("expectation: row mask of the sums",
             KERNELS, "lane % 4 == 0 && row < own.count", "lane % 4 == 0", 1),
    Mutation("expectation: merge's row mask", KERNELS, "if (row >= count) return;", "", 2),
    Mutation("expectation: merge's fence of a warp", KERNELS, "__syncwarp();"),
    Mutation("expectation: nothing allowed", KERNELS, "state.sum == acc_t(0) ? acc_t(0) : "),
    Mutation("expectation: backward's row mask", KERNELS, "if (row >= N) return;"),
    Mutation("expectation: positives from the end", KERNELS, "if (j < 0) j += M;"),
    Mutation("softmax: nothing came yet",
             "device/online_softmax.cuh", "larger == -Math<T>::infinity() ? T(0) : ", ""),
]  # fmt: skip

# The engines that the mutated copies leave out, to compile in seconds.
UNUSED_ENGINES = ["MmaEngine<__nv_bfloat16>", "FmaEngine<double>", "MmaEngine<float>"]


def checks():
    """(name, what `check_parity` takes): the calls that stand for the test-suite here."""
    half, single = torch.float16, torch.float32
    ids_but_one = random_call(9, 8, single, ids=True)
    ids_but_one.row_ids.zero_()
    ids_but_one_column = random_call(9, 8, single, m=9, ids=True)
    ids_but_one_column.row_ids[2:].zero_()
    ids_but_one_column.column_ids.zero_()
    zero_rows = random_call(12, 24, half)
    zero_rows.rows[3] = 0
    zero_rows_in_float = random_call(12, 24, single)
    zero_rows_in_float.rows[3] = 0
    both = random_call(65, 40, half, m=70, ids=True, both_directions=True, keep_diagonal=True, positives=2)
    tiny = random_call(5, 8, single)
    tiny.rows[2] = 3e-13  # a norm of 8.5e-13
    return [
        ("square", random_call(130, 72, half), {}),
        ("square, float32", random_call(70, 72, single), {"seed": 1}),
        ("random order", random_call(130, 72, half), {"seed": 2, "warp_races": True}),
        ("another order", random_call(130, 200, half), {"seed": 3, "warp_races": True}),
        ("odd width", random_call(65, 17, half), {}),
        ("ids in both directions", both, {"splits": 2}),
        ("ids, nothing kept", random_call(66, 40, single, m=64, ids=True), {}),
        ("ids, whole tiles", random_call(64, 64, half, ids=True), {}),
        ("whole tiles", random_call(128, 64, half), {}),
        ("small temperature", random_call(65, 24, single, temperature=0.005), {}),
        ("no column left", ids_but_one, {}),
        ("zero row, half", zero_rows, {}),
        ("zero row, float32", zero_rows_in_float, {}),
        ("tiny row", tiny, {}),
        ("expectation", random_call(130, 72, half, m=200), {"splits": 3, "expectation": True}),
        ("expectation, random order", random_call(130, 72, half, m=200),
         {"splits": 3, "expectation": True, "seed": 2, "warp_races": True}),
        ("expectation, no column left", ids_but_one_column, {"expectation": True}),
        ("unnormalised", random_call(20, 40, half, m=33, normalize=False, temperature=2.0), {}),
    ]  # fmt: skip


def mutated_copy(folder, mutation=None):
    """Copies csrc/cuda into `folder` with the mutation; returns the .cu file."""
    copy = Path(folder) / "cuda"
    shutil.copytree(SOURCES, copy)
    engines = copy / "launcher.cuh"
    text = engines.read_text()
    for engine in UNUSED_ENGINES:
        text = text.replace(f"return f({engine}());", "return;")
    engines.write_text(text)
    if mutation is not None:
        path = copy / mutation.file
        parts = path.read_text().split(mutation.old)
        if len(parts) < mutation.nth + 2:
            raise ValueError(
                f"{mutation.name}: {mutation.old!r} is {len(parts) - 1} times in {mutation.file}"
            )
        split = mutation.nth + 1
        path.write_text(mutation.old.join(parts[:split]) + mutation.new + mutation.old.join(parts[split:]))
    return copy / LAUNCHERS


def build(mutation=None):
    with tempfile.TemporaryDirectory() as folder:
        return EmulatedCudaLibrary([mutated_copy(folder, mutation)], 80)


def noticed_by(library):
    """Name of the first check that fails with what it said, or None."""
    for name, call, options in checks():
        try:
            check_parity(library, call, **options)
        except PtxError as error:
            return name, re.sub(r"^_Z\w+:?\s*", "", str(error).splitlines()[0])
        except AssertionError as error:
            return name, "wrong numbers: " + (str(error).splitlines() or [""])[0]
    return None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the names of the mutations")
    parser.add_argument("names", nargs="*", help="run only these")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if not options.names or mutation.name in options.names]
    if options.list:
        print("\n".join(mutation.name for mutation in chosen))
        return 0
    missed = 0
    with ThreadPoolExecutor(max_workers=2) as pool:
        unharmed = noticed_by(build())
        if unharmed:
            print(f"the kernels fail as they are: {unharmed}")
            return 1
        for mutation, library in zip(chosen, pool.map(build, chosen), strict=True):
            found = noticed_by(library)
            missed += found is None
            verdict = "NOT NOTICED" if found is None else f"{found[0]}: {found[1][:90]}"
            print(f"{mutation.name:42} {verdict}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} noticed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
