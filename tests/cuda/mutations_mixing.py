"""Mutations of the mixing kernels, and the checks that are to notice them."""

import torch

from ssl_kernels.reference import cutmix as cutmix_reference
from ssl_kernels.reference import mixup as mixup_reference
from ssl_kernels.reference import mixup_cross_entropy as cross_entropy_reference
from ssl_kernels.reference import mixup_normalize as normalize_reference
from tests.cuda import mixing_calls as calls
from tests.cuda.mutation import Mutation, require
from tests.support.mixing import boxes_of, permutation_of, shares_of

WALK, MIXUP, CUTMIX = "permutation_walk.cuh", "mixup.cuh", "cutmix.cuh"
NORMALIZE, CROSS_ENTROPY = "mixup_normalize.cuh", "mixup_cross_entropy.cuh"
BARRIER = "__syncthreads();"


MUTATIONS = {
    "mixup": [
        Mutation("order: barrier of the sum over warps", WALK, BARRIER, at="scratch[warp] = inclusive;"),
        Mutation("order: barrier after the sum over warps", WALK, BARRIER, at="scratch[lane] = sum - total;"),
        Mutation("order: barrier before numbers are marked as seen", WALK, BARRIER, at="seen[j] = 0;"),
        Mutation("order: barrier before the faults are read", WALK, BARRIER, at="atomicOr(&faults, 1);"),
        Mutation("order: barrier after the successors", WALK, BARRIER, at="successor[inverse ? partner : j] ="),
        Mutation("order: barrier before the rounds", WALK, BARRIER, at="scratch.distance[0][j] = 0;"),
        Mutation("order: barrier of a round", WALK, BARRIER, at="swap(distance, next_distance);"),
        Mutation("order: barrier before the places", WALK, BARRIER, at="begin += length_of(j);"),
        Mutation("order: range of the permutation", WALK, "partner < 0 || partner >= count || "),
        Mutation("order: numbers that come twice", WALK, "atomicExch(&seen[partner], 1) != 0", "false"),
        Mutation("order: one round less", WALK, "reach < count; reach *= 2", "2 * reach < count; reach *= 2"),
        Mutation("order: distance from afar", WALK, "static_cast<int>(reach) + distance[far]", "distance[far]"),
        Mutation("order: who reads the successor", WALK, "next != acc_t(0) || (its_own"," (its_own"),
        Mutation("order: fixed points", WALK, "successor == j ? acc_t(0) : acc_t(1) - lam", "acc_t(1) - lam"),
        Mutation("walk: the first held aside", WALK, "last ? first : next.values", "next.values"),
        Mutation("walk: the first of the next cycle", WALK, "if (last) first = next.values;"),
        Mutation("walk: what is not written", WALK, "if (now[u].step.writes()) write", "write"),
        Mutation("walk: end of a piece", WALK, "if (base + u < end) {", "if (base + u < count) {"),
        Mutation("walk: end of the order", WALK, " || k >= count"),
        Mutation("walk: steps after a piece", WALK, "k > end || ", harmless="only reads what nobody uses"),
        Mutation("walk: sample after a piece", WALK, "if (k < end) {", "if (true) {"),
        Mutation("mixup: values at the end of a piece", MIXUP, "edges ? edge(2 * int64_t{blockIdx.y}) : "),
        Mutation("mixup: head of a cut cycle", MIXUP, "edges ? edge(2 * int64_t{blockIdx.y} - 1) : "),
        Mutation("mixup: features past the end", MIXUP, "if (feature >= features) return;", at="mixup_walk_kernel("),
        Mutation("mixup: features past the end at the edges", MIXUP, "if (feature >= features) return;",
                 at="mixup_edges_kernel("),
        Mutation("gradient: features past the end", MIXUP, "inside ? Values{", "true ? Values{"),
        Mutation("gradient: what is inside", MIXUP, "inside = feature < features;", "inside = true;"),
        Mutation("gradient: warps past the end", MIXUP,
                 "if ((thread - threadIdx.x % kWarpSize) * kVec >= features) return;"),
        Mutation("gradient: partial sums past the end", MIXUP, "if (sample < count) {", "{"),
        Mutation("gradient: fixed points count nothing", MIXUP, "if (successor != step.sample()) {", "{"),
        Mutation("gradient: barrier of the sum over warps", MIXUP, BARRIER),
        Mutation("gradient: samples past the end", MIXUP, "lane == 0 && own < count", "lane == 0"),
        Mutation("mixup: own weight of 0", MIXUP, "if (own == acc_t(0)) return", "if (false) return"),
        Mutation("index: stride of lam", WALK, "acc_t operator[](int j) const { return data[j * stride]; }",
                 "acc_t operator[](int j) const { return data[j]; }"),
        Mutation("index: stride of the permutation",
                 WALK, "int64_t operator[](int j) const { return data[j * stride]; }",
                 "int64_t operator[](int j) const { return data[j]; }"),
    ],
    "cutmix": [
        Mutation("cutmix: barrier before a chunk", CUTMIX, BARRIER, at="base < count; base += kCutChunk"),
        Mutation("cutmix: barrier after a chunk", CUTMIX, BARRIER, at="reinterpret_cast<uint4*>(chunk)[i] ="),
        Mutation("cutmix: the first held aside", CUTMIX, "step.last && held ? head : "),
        Mutation("cutmix: held for this cycle only", CUTMIX, "if (step.length > 0) held = false;"),
        Mutation("cutmix: features past the end", CUTMIX, "if (!exists) continue;"),
        Mutation("cutmix: what exists", CUTMIX, "exists = index < features;", "exists = true;"),
        Mutation("cutmix: features past the end, out of place", CUTMIX, "if (index >= features) return;"),
        Mutation("cutmix: pieces at the edges", CUTMIX, "if (mask == (1u << kVec) - 1) {", "if (true) {"),
        Mutation("cutmix: box ends", CUTMIX, "columns_[e] < box.x1;", "columns_[e] <= box.x1;"),
        Mutation("cutmix: clipped boxes", CUTMIX, "value < 0 ? 0 : value > size ? size : value", "value"),
        Mutation("cutmix: barrier out of place", CUTMIX, BARRIER, at="sources_of(static_cast<int>(first)"),
        Mutation("cutmix: partner out of range", CUTMIX, "partner >= 0 && partner < permutation.count", "true"),
        Mutation("cutmix gradient: both", CUTMIX, "from_own && from_source ? add", "false ? add"),
        Mutation("index: stride of boxes", CUTMIX, "data + i * strides[0]", "data + i * 4"),
        Mutation("index: stride of a box's ends", CUTMIX, "row[column * strides[1]]", "row[column]"),
    ],
    "mixup_normalize": [
        Mutation("normalize: features past the end", NORMALIZE, "if (index >= features) return;"),
        Mutation("normalize: channel", NORMALIZE, " % channels.count"),
        Mutation("index: stride of std", NORMALIZE, "c * channels.std_stride", "c * channels.mean_stride"),
        Mutation("index: stride of mean", NORMALIZE, "c * channels.mean_stride", "c"),
    ],
    "mixup_cross_entropy": [
        Mutation("cross-entropy: rows past the end", CROSS_ENTROPY, "if (i >= problem.N) return;",
                 at="mixup_cross_entropy_loss_kernel("),
        Mutation("cross-entropy: gradient's rows past the end", CROSS_ENTROPY, "if (i >= problem.N) return;",
                 at="mixup_cross_entropy_grad_kernel("),
        Mutation("cross-entropy: partner out of range",
                 CROSS_ENTROPY, "other >= 0 && other < N ? target[other] : -1", "target[other]"),
        Mutation("cross-entropy: singles", CROSS_ENTROPY, "before < count ? before : count", "0"),
        Mutation("cross-entropy: running maximum", CROSS_ENTROPY, "total *= exp(maximum - shift);"),
        Mutation("cross-entropy: barrier", CROSS_ENTROPY, BARRIER),
        Mutation("cross-entropy: rounding of lse", CROSS_ENTROPY, " * correction - soft", " - soft"),
        Mutation("cross-entropy: other alignment", CROSS_ENTROPY,
                 "% 16 != 0) parts.vectors = 0;", "% 16 != 0) {}"),
        Mutation("cross-entropy: target out of range", CROSS_ENTROPY, " && label >= 0 && label < C"),
        Mutation("cross-entropy: classes to ignore", CROSS_ENTROPY, "label != ignore_index && "),
        Mutation("cross-entropy: partners' classes", CROSS_ENTROPY, "if (partner_is_class) return other;"),
        Mutation("cross-entropy: one term alone", CROSS_ENTROPY, "own && other ? 1.0 : of_own + of_other", "1.0"),
        Mutation("cross-entropy: weight of 0", CROSS_ENTROPY, "weight[e] == acc_t(0) ? acc_t(0) : "),
        Mutation("cross-entropy: what does not count", CROSS_ENTROPY, "counts ? result : acc_t(0)", "result"),
        Mutation("cross-entropy: lse that does not count", CROSS_ENTROPY,
                 "row.mass != 0 ? row.mass * row_lse : 0.0", "row.mass * row_lse"),
        Mutation("cross-entropy: mass in the gradient", CROSS_ENTROPY, "static_cast<acc_t>(row.mass)", "acc_t(1)"),
        Mutation("cross-entropy: weights in the gradient", CROSS_ENTROPY, "soft_target *= problem.weight[c];"),
        Mutation("cross-entropy: sum of the weights", CROSS_ENTROPY, "row.spread * *weight_sum", "row.spread * C"),
        Mutation("index: stride of lam", CROSS_ENTROPY, "lam[i * lam_stride]", "lam[i]"),
        Mutation("index: stride of the permutation", CROSS_ENTROPY, "partner[i * partner_stride]", "partner[i]"),
        Mutation("index: stride of the incoming gradient", CROSS_ENTROPY, "grad_loss[i * grad_loss_stride]",
                 "grad_loss[i]"),
    ],
}  # fmt: skip


def _apart(tensor, gap=2):
    """The same values, `gap` elements apart, numbers that spoil a result between them."""
    poison = torch.nan if tensor.dtype.is_floating_point else 10**12
    return torch.full((*tensor.shape, gap), poison, dtype=tensor.dtype)[..., 0].copy_(tensor)


def _close(found, exact, tolerance, what):
    require(torch.allclose(found.double(), exact.double(), rtol=tolerance, atol=tolerance), what)


def check_mixup(library):
    for count, features, parts, kind in [
        (70, 37, 1, "random"),
        (40, 72, 3, "one cycle"),
        (9, 40, 2, "fixed points"),
        # steps and partial sums fill whole 256 bytes of the workspace, which ends there
        (48, 512, 1, "random"),
    ]:
        for options in ({}, {"seed": 1, "warp_races": True}):
            generator = torch.Generator().manual_seed(count)
            x, grad = torch.randn(2, count, features, generator=generator)
            lam, permutation = _apart(shares_of(count, x.dtype)), _apart(permutation_of(kind, count), 3)
            exact = mixup_reference.mixup(x.double(), lam.double(), permutation)
            in_place = x.clone()
            out, _ = calls.mixup(library, x, lam, permutation, parts=parts, **options)
            _, launches = calls.mixup(library, in_place, lam, permutation, in_place, parts=parts, **options)
            _close(out, exact, 1e-5, "out of place")
            require(torch.equal(in_place, out), "in place")
            kept = (lam == 1) | (permutation == torch.arange(count))
            stored = calls.counted(launches, "mixup_walk_kernel").global_store_bytes
            require(
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
    require(torch.equal(out[0], infinite[1]), "a weight of 0")
    grad_x, _, _ = calls.mixup_bwd(library, infinite, None, torch.tensor([0.0, 0.5]), torch.tensor([1, 0]))
    require(torch.equal(grad_x[0], infinite[1] / 2), "a weight of 0 in the gradient")
    fixed = infinite.clone()
    _, grad_lam, _ = calls.mixup_bwd(library, fixed, fixed, torch.rand(2), torch.arange(2))
    require((grad_lam == 0).all(), "gradient by lam at an infinite fixed point")
    x, none = torch.randn(70, 3), torch.arange(70).roll(1)
    none[69] = 70  # which only the last warp sees
    in_place = x.clone()
    calls.mixup(library, in_place, torch.rand(70), none, in_place)
    require(torch.equal(in_place, x), "no permutation")
    for bad in ([0, 0], [2**32 + 1, 0], [-1, 0]):
        before = infinite.clone()
        calls.mixup(library, before, torch.rand(2), torch.tensor(bad), before)
        require(torch.equal(before, infinite), "no permutation")


def check_cutmix(library):
    for shape, kind in [
        ((150, 1, 5, 7), "one cycle"),
        ((9, 2, 6, 16), "random"),
        ((40, 1, 3, 8), "flip"),
    ]:
        for options in ({}, {"seed": 1, "warp_races": True}):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            boxes = _apart(boxes_of(shape[0], *shape[-2:]))
            permutation = permutation_of(kind, shape[0])
            exact = cutmix_reference.cutmix(x, boxes, permutation)
            out, _ = calls.cutmix(library, x, boxes, permutation, **options)
            require(torch.equal(out, exact), "out of place")
            in_place = x.clone()
            calls.cutmix(library, in_place, boxes, permutation, in_place, **options)
            require(torch.equal(in_place, exact), "in place")
            grad_x, _ = calls.cutmix_bwd(library, x, boxes, permutation, **options)
            require(torch.equal(grad_x, cutmix_reference.cutmix_bwd(x, boxes, permutation)), "gradient")
    far = torch.tensor([[2**32, 2**32 + 4, 0, 7], [-(2**32), 5, -(2**32) + 3, 7]])
    x = torch.randn(2, 1, 5, 7)
    out, _ = calls.cutmix(library, x, far, torch.tensor([1, 0]))
    require(torch.equal(out, torch.stack([x[0], x[0]])), "boxes outside the image")
    calls.cutmix(library, x, boxes_of(2, 5, 7), torch.tensor([2**31, -1]))
    out, _ = calls.cutmix(library, x, boxes_of(2, 5, 7), torch.tensor([2**32 + 1, 2**32]))
    require(torch.equal(out, x), "partners outside the batch")


def check_mixup_normalize(library):
    layouts = [torch.contiguous_format, torch.channels_last]
    for shape, layout in zip([(7, 3, 4, 8), (5, 2, 3, 7)], layouts, strict=True):
        x = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(1)).to(torch.uint8)
        x = x.to(memory_format=layout)
        lam, permutation = shares_of(shape[0], torch.float32), permutation_of("random", shape[0])
        mean, std = _apart(torch.linspace(0.1, 0.6, shape[1])), _apart(torch.linspace(0.2, 0.4, shape[1]), 3)
        doubles = (tensor.double() for tensor in (mean, std))
        exact = normalize_reference.mixup_normalize(x, lam.double(), permutation, *doubles, torch.float64)
        out, _ = calls.mixup_normalize(library, x, lam, permutation, mean, std, torch.float32)
        _close(out, exact, 1e-5, "wrong numbers")


def check_mixup_cross_entropy(library):
    for rows, classes, offset, shift, weighted in [
        (5, 300, 0, 0.0, False),
        (6, 37, 3, 0.0, True),
        (3, 64, 0, 2e4, False),
        (6, 264, 0, 0.0, True),
    ]:
        for options in ({"warps_per_row": 1}, {"warps_per_row": 8, "seed": 1, "warp_races": True}):
            generator = torch.Generator().manual_seed(rows)
            wide = 20 * torch.randn(rows, classes + 2 * offset, generator=generator) + shift
            logits = (
                wide[:, offset : offset + classes].contiguous() if offset == 0 else wide[:, offset:-offset]
            )
            target = torch.randint(classes, (rows,), generator=generator)
            lam, partner = shares_of(rows, torch.float32), permutation_of("random", rows)
            by_definition = [target, partner, lam.double(), None, 0.1]
            if weighted:
                target[:2], partner = 2, target[partner]
                weight = torch.rand(classes, generator=generator)
                options |= {"weight": weight, "ignore_index": 2, "partner_is_class": True}
                by_definition = [target, partner, lam.double(), weight.double(), 0.1, 2, True]
            leaf = logits.double().requires_grad_()
            exact = cross_entropy_reference.mixup_cross_entropy(leaf, *by_definition)
            (exact_grad,) = torch.autograd.grad(exact.sum(), leaf)
            operands = (logits, target, _apart(partner, 3), _apart(lam))
            loss, lse, counted, _ = calls.mixup_cross_entropy_fwd(library, *operands, 0.1, **options)
            _close(loss, exact.detach(), 1e-5 + 1e-7 * shift, "loss")
            terms = cross_entropy_reference.target_terms(
                *by_definition[:4], *(by_definition[5:] or (-100, False))
            )
            _close(counted, terms.counted, 1e-6, "weights in the mean")
            ones = _apart(torch.ones(rows, dtype=torch.float64))
            grad, _ = calls.mixup_cross_entropy_bwd(library, ones, *operands, lse, 0.1, **options)
            require((grad.double() - exact_grad).abs().max() < 2e-6, "gradient")
    logits, target = torch.randn(3, 5), torch.tensor([1, 2, 3])
    loss, _, _, _ = calls.mixup_cross_entropy_fwd(
        library, logits, target, torch.tensor([2**32 + 2, 1, -1]), torch.full((3,), 0.5)
    )
    own = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
    _close(loss, torch.tensor([0.5, 1.0, 0.5]) * own, 1e-5, "a partner in range beside others")
    target, logits = torch.tensor([5, -1, 2**32 + 3]), torch.randn(3, 5)
    logits[0] = torch.nan
    operands = (logits, target, torch.arange(3), torch.full((3,), 0.5))
    loss, lse, _, _ = calls.mixup_cross_entropy_fwd(library, *operands)
    grad, _ = calls.mixup_cross_entropy_bwd(library, torch.ones(3, dtype=torch.float64), *operands, lse)
    require((loss == 0).all() and (grad == 0).all(), "targets outside the classes")
    weight = torch.tensor([0.0, *[1.0] * 36])
    logits = torch.randn(1, 37)
    logits[0, 0] = -torch.inf
    operands = (logits, torch.tensor([3]), torch.tensor([0]), torch.ones(1), 0.1)
    loss, _, _, _ = calls.mixup_cross_entropy_fwd(library, *operands, weight=weight)
    require(loss.isfinite().all(), "-inf in a class of weight 0")


CHECKS = {
    "mixup": check_mixup,
    "cutmix": check_cutmix,
    "mixup_normalize": check_mixup_normalize,
    "mixup_cross_entropy": check_mixup_cross_entropy,
}
