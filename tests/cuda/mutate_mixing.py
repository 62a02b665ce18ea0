"""Breaks the mixing kernels, one barrier, mask or guard at a time: which check notices?

    python -m tests.cuda.mutate_mixing [--list] [NAME ...]

Works on a copy of csrc/cuda, compiled for emulated sm_80 without float64 and bfloat16. Every mutation must be noticed:
the exit code is 1 if one was not.
"""

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from ssl_kernels.reference import cutmix as cutmix_reference
from ssl_kernels.reference import mixup as mixup_reference
from ssl_kernels.reference import mixup_cross_entropy as cross_entropy_reference
from ssl_kernels.reference import mixup_normalize as normalize_reference
from tests.cuda import mixing_calls as calls
from tests.gpu_emulation import EmulatedCudaLibrary, PtxError
from tests.mixing_cases import boxes_of, permutation_of, shares_of

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
WALK, MIXUP, CUTMIX = "permutation_walk.cuh", "mixup.cuh", "cutmix.cuh"
NORMALIZE, CROSS_ENTROPY = "mixup_normalize.cuh", "mixup_cross_entropy.cuh"
BARRIER = "__syncthreads();"


class Mutation(NamedTuple):
    """The nth occurrence (from 0) of `old` in `file` becomes `new`; the checks of `operation` are to notice."""

    name: str
    operation: str
    file: str
    old: str
    new: str = ""
    nth: int = 0


MUTATIONS = [
    Mutation("order: barrier of the sum over warps", "mixup", WALK, BARRIER, nth=0),
    Mutation("order: barrier after the sum over warps", "mixup", WALK, BARRIER, nth=1),
    Mutation("order: barrier before numbers are marked as seen", "mixup", WALK, BARRIER, nth=2),
    Mutation("order: barrier before the faults are read", "mixup", WALK, BARRIER, nth=3),
    Mutation("order: barrier after the successors", "mixup", WALK, BARRIER, nth=4),
    Mutation("order: barrier before the rounds", "mixup", WALK, BARRIER, nth=5),
    Mutation("order: barrier of a round", "mixup", WALK, BARRIER, nth=6),
    Mutation("order: barrier before the places", "mixup", WALK, BARRIER, nth=7),
    Mutation("order: range of the permutation", "mixup", WALK, "partner < 0 || partner >= count || "),
    Mutation("order: numbers that come twice", "mixup", WALK, "atomicExch(&seen[partner], 1) != 0", "false"),
    Mutation("order: one round less", "mixup", WALK, "reach < count; reach *= 2", "2 * reach < count; reach *= 2"),
    Mutation("order: distance from afar", "mixup", WALK, "static_cast<int>(reach) + distance[far]", "distance[far]"),
    Mutation("order: who reads the successor", "mixup", WALK, "next != acc_t(0) || (its_own"," (its_own"),
    Mutation("order: fixed points", "mixup", WALK, "successor == j ? acc_t(0) : acc_t(1) - lam", "acc_t(1) - lam"),
    Mutation("walk: the first held aside", "mixup", WALK, "last ? first : next.values", "next.values"),
    Mutation("walk: the first of the next cycle", "mixup", WALK, "if (last) first = next.values;"),
    Mutation("walk: what is not written", "mixup", WALK, "if (now[u].step.writes()) write", "write"),
    Mutation("walk: end of a piece", "mixup", WALK, "if (base + u < end) {", "if (base + u < count) {"),
    Mutation("mixup: values at the end of a piece", "mixup", MIXUP, "edges ? edge(2 * int64_t{blockIdx.y}) : "),
    Mutation("mixup: head of a cut cycle", "mixup", MIXUP, "edges ? edge(2 * int64_t{blockIdx.y} - 1) : "),
    Mutation("mixup: features past the end", "mixup", MIXUP, "if (feature >= features) return;", "", 1),
    Mutation("gradient: features past the end", "mixup", MIXUP, "inside ? Values{", "true ? Values{"),
    Mutation("gradient: fixed points count nothing", "mixup", MIXUP, "if (successor != step.sample()) {", "{"),
    Mutation("gradient: barrier of the sum over warps", "mixup", MIXUP, BARRIER),
    Mutation("gradient: samples past the end", "mixup", MIXUP, "lane == 0 && own < count", "lane == 0"),
    Mutation("mixup: own weight of 0", "mixup", MIXUP, "if (own == acc_t(0)) return", "if (false) return"),
    Mutation("cutmix: barrier before a chunk", "cutmix", CUTMIX, BARRIER, nth=0),
    Mutation("cutmix: barrier after a chunk", "cutmix", CUTMIX, BARRIER, nth=1),
    Mutation("cutmix: the first held aside", "cutmix", CUTMIX, "step.last && held ? head : "),
    Mutation("cutmix: held for this cycle only", "cutmix", CUTMIX, "if (step.length > 0) held = false;"),
    Mutation("cutmix: features past the end", "cutmix", CUTMIX, "if (!exists) continue;"),
    Mutation("cutmix: pieces at the edges", "cutmix", CUTMIX, "if (mask == (1u << kVec) - 1) {", "if (true) {"),
    Mutation("cutmix: box ends", "cutmix", CUTMIX, "columns_[e] < box.x1;", "columns_[e] <= box.x1;"),
    Mutation("cutmix: clipped boxes", "cutmix", CUTMIX, "value < 0 ? 0 : value > size ? size : value", "value"),
    Mutation("cutmix: barrier out of place", "cutmix", CUTMIX, BARRIER, nth=2),
    Mutation("cutmix: partner out of range", "cutmix", CUTMIX, "partner >= 0 && partner < permutation.count", "true"),
    Mutation("cutmix gradient: both", "cutmix", CUTMIX, "from_own && from_source ? add", "false ? add"),
    Mutation("normalize: features past the end", "mixup_normalize", NORMALIZE, "if (index >= features) return;"),
    Mutation("normalize: channel", "mixup_normalize", NORMALIZE, " % channels.count"),
    Mutation("cross-entropy: rows past the end", "mixup_cross_entropy", CROSS_ENTROPY, "if (i >= problem.N) return;"),
    Mutation("cross-entropy: singles", "mixup_cross_entropy", CROSS_ENTROPY, "before < count ? before : count", "0"),
    Mutation("cross-entropy: running maximum", "mixup_cross_entropy", CROSS_ENTROPY, "total *= exp(maximum - shift);"),
    Mutation("cross-entropy: barrier", "mixup_cross_entropy", CROSS_ENTROPY, BARRIER),
    Mutation("cross-entropy: rounding of lse", "mixup_cross_entropy", CROSS_ENTROPY, " * correction - soft", " - soft"),
    Mutation("cross-entropy: other alignment", "mixup_cross_entropy", CROSS_ENTROPY,
             "% 16 != 0) parts.vectors = 0;", "% 16 != 0) {}"),
    Mutation("cross-entropy: target out of range", "mixup_cross_entropy", CROSS_ENTROPY,
             "return label >= 0 && label < C ?", "return true ?"),
]  # fmt: skip

# The dtypes that the mutated copies leave out, to compile in seconds.
UNUSED = [r"case kFloat64: .*", r"case kBFloat16: .*", r"case (1|8): cutmix.*"]


def _require(claim, what):
    if not claim:
        raise AssertionError(what)


def _close(found, exact, tolerance, what):
    _require(torch.allclose(found.double(), exact.double(), rtol=tolerance, atol=tolerance), what)


def check_mixup(library):
    for count, features, parts, kind in [
        (70, 37, 1, "random"),
        (40, 72, 3, "one cycle"),
        (9, 40, 2, "fixed points"),
    ]:
        for options in ({}, {"seed": 1, "warp_races": True}):
            generator = torch.Generator().manual_seed(count)
            x, grad = torch.randn(2, count, features, generator=generator)
            lam, permutation = shares_of(count, x.dtype), permutation_of(kind, count)
            exact = mixup_reference.mixup(x.double(), lam.double(), permutation)
            in_place = x.clone()
            out, _ = calls.mixup(library, x, lam, permutation, parts=parts, **options)
            _, launches = calls.mixup(library, in_place, lam, permutation, in_place, parts=parts, **options)
            _close(out, exact, 1e-5, "out of place")
            _require(torch.equal(in_place, out), "in place")
            kept = (lam == 1) | (permutation == torch.arange(count))
            stored = calls.counted(launches, "mixup_walk_kernel").global_store_bytes
            _require(
                stored == (~kept).sum().item() * features * 4, "samples that stay as they are were written"
            )
            grad_x, grad_lam, _ = calls.mixup_bwd(library, grad, x, lam, permutation, parts=parts, **options)
            exact_x, exact_lam = mixup_reference.mixup_bwd(
                grad.double(), x.double(), lam.double(), permutation
            )
            _close(grad_x, exact_x, 1e-5, "gradient by x")
            _close(grad_lam, exact_lam, 1e-4, "gradient by lam")
    infinite = torch.tensor([[1.0, torch.inf], [2.0, 3.0]])
    out, _ = calls.mixup(library, infinite, torch.tensor([0.0, 0.5]), torch.tensor([1, 0]))
    _require(torch.equal(out[0], infinite[1]), "a weight of 0")
    grad_x, _, _ = calls.mixup_bwd(library, infinite, None, torch.tensor([0.0, 0.5]), torch.tensor([1, 0]))
    _require(torch.equal(grad_x[0], infinite[1] / 2), "a weight of 0 in the gradient")
    fixed = infinite.clone()
    _, grad_lam, _ = calls.mixup_bwd(library, fixed, fixed, torch.rand(2), torch.arange(2))
    _require((grad_lam == 0).all(), "gradient by lam at an infinite fixed point")
    x, none = torch.randn(70, 3), torch.arange(70).roll(1)
    none[69] = 70  # which only the last warp sees
    in_place = x.clone()
    calls.mixup(library, in_place, torch.rand(70), none, in_place)
    _require(torch.equal(in_place, x), "no permutation")
    for bad in ([0, 0], [2**40, 0], [-1, 0]):
        before = infinite.clone()
        calls.mixup(library, before, torch.rand(2), torch.tensor(bad), before)
        _require(torch.equal(before, infinite), "no permutation")


def check_cutmix(library):
    for shape, kind in [
        ((150, 1, 5, 7), "one cycle"),
        ((9, 2, 6, 16), "random"),
        ((40, 1, 3, 8), "flip"),
    ]:
        for options in ({}, {"seed": 1, "warp_races": True}):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            boxes, permutation = boxes_of(shape[0], *shape[-2:]), permutation_of(kind, shape[0])
            exact = cutmix_reference.cutmix(x, boxes, permutation)
            out, _ = calls.cutmix(library, x, boxes, permutation, **options)
            _require(torch.equal(out, exact), "out of place")
            in_place = x.clone()
            calls.cutmix(library, in_place, boxes, permutation, in_place, **options)
            _require(torch.equal(in_place, exact), "in place")
            grad_x, _ = calls.cutmix_bwd(library, x, boxes, permutation, **options)
            _require(torch.equal(grad_x, cutmix_reference.cutmix_bwd(x, boxes, permutation)), "gradient")
    far = torch.tensor([[2**32, 2**32 + 4, 0, 7], [-(2**32), 5, -(2**32) + 3, 7]])
    x = torch.randn(2, 1, 5, 7)
    out, _ = calls.cutmix(library, x, far, torch.tensor([1, 0]))
    _require(torch.equal(out, torch.stack([x[0], x[0]])), "boxes outside the image")
    calls.cutmix(library, x, boxes_of(2, 5, 7), torch.tensor([2**31, -1]))


def check_mixup_normalize(library):
    layouts = [torch.contiguous_format, torch.channels_last]
    for shape, layout in zip([(7, 3, 4, 8), (5, 2, 3, 7)], layouts, strict=True):
        x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
        x = x.to(memory_format=layout)
        lam, permutation = shares_of(shape[0], torch.float32), permutation_of("random", shape[0])
        mean, std = torch.linspace(0.1, 0.6, shape[1]), torch.linspace(0.2, 0.4, shape[1])
        doubles = (tensor.double() for tensor in (mean, std))
        exact = normalize_reference.mixup_normalize(x, lam.double(), permutation, *doubles, torch.float64)
        out, _ = calls.mixup_normalize(library, x, lam, permutation, mean, std, torch.float32)
        _close(out, exact, 1e-5, "wrong numbers")


def check_mixup_cross_entropy(library):
    for rows, classes, offset, shift in [(5, 300, 0, 0.0), (6, 37, 3, 0.0), (3, 64, 0, 2e4)]:
        for options in ({"warps_per_row": 1}, {"warps_per_row": 8, "seed": 1, "warp_races": True}):
            generator = torch.Generator().manual_seed(rows)
            wide = 20 * torch.randn(rows, classes + 2 * offset, generator=generator) + shift
            logits = (
                wide[:, offset : offset + classes].contiguous() if offset == 0 else wide[:, offset:-offset]
            )
            target = torch.randint(classes, (rows,), generator=generator)
            lam, permutation = shares_of(rows, torch.float32), permutation_of("random", rows)
            leaf = logits.double().requires_grad_()
            exact = cross_entropy_reference.mixup_cross_entropy(leaf, target, permutation, lam.double(), 0.1)
            (exact_grad,) = torch.autograd.grad(exact.sum(), leaf)
            operands = (logits, target, permutation, lam)
            loss, lse, _ = calls.mixup_cross_entropy_fwd(library, *operands, 0.1, **options)
            _close(loss, exact.detach(), 1e-5 + 1e-7 * shift, "loss")
            ones = torch.ones(rows, dtype=torch.float64)
            grad, _ = calls.mixup_cross_entropy_bwd(library, ones, *operands, lse, 0.1, **options)
            _require((grad.double() - exact_grad).abs().max() < 2e-6, "gradient")
    target = torch.tensor([5, -1, 2**40])
    loss, lse, _ = calls.mixup_cross_entropy_fwd(
        library, torch.randn(3, 5), target, torch.arange(3), torch.full((3,), 0.5)
    )
    _require(torch.equal(loss, lse), "targets outside the classes")


CHECKS = {
    "mixup": check_mixup,
    "cutmix": check_cutmix,
    "mixup_normalize": check_mixup_normalize,
    "mixup_cross_entropy": check_mixup_cross_entropy,
}


def build(operation, mutation=None):
    """The operation's library from a copy of csrc/cuda, with the mutation."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "cuda"
        shutil.copytree(SOURCES, copy)
        launchers = copy / f"{operation}.cu"
        launchers.write_text(re.sub("|".join(UNUSED), "", launchers.read_text()))
        if mutation is not None:
            path = copy / mutation.file
            parts = path.read_text().split(mutation.old)
            if len(parts) < mutation.nth + 2:
                raise ValueError(
                    f"{mutation.name}: {mutation.old!r} is {len(parts) - 1} times in {mutation.file}"
                )
            split = mutation.nth + 1
            text = mutation.old.join(parts[:split]) + mutation.new + mutation.old.join(parts[split:])
            path.write_text(text)
        return EmulatedCudaLibrary([launchers], 80)


def noticed_by(operation, library):
    """What the operation's check says first, or None."""
    try:
        CHECKS[operation](library)
    except PtxError as error:
        return re.sub(r"^_Z\w+:?\s*", "", str(error).splitlines()[0])
    except AssertionError as error:
        return f"wrong numbers: {error}"
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
    for operation in dict.fromkeys(mutation.operation for mutation in chosen):
        unharmed = noticed_by(operation, build(operation))
        if unharmed:
            print(f"{operation} fails as it is: {unharmed}")
            return 1
    missed = 0
    for mutation in chosen:
        found = noticed_by(mutation.operation, build(mutation.operation, mutation))
        missed += found is None
        print(f"{mutation.name:48} {found[:100] if found else 'NOT NOTICED'}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} noticed")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
