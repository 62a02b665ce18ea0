"""Triton kernels at the edges of what they promise, and copies of them, broken at one place, that must be noticed."""

import contextlib
import importlib

import pytest
import torch
import triton

from ssl_kernels.reference.batch_hard import batch_hard as hardest_by_definition
from ssl_kernels.reference.contrastive import contrastive as contrastive_by_definition
from ssl_kernels.triton.launch import tile_for
from tests.cuda.edge_rows import require_halves, short_rows
from tests.gpu_emulation import PtxError, emulated_triton
from tests.layouts import far_apart
from tests.support.queue_push import Ring, keys_of
from tests.support.row_pairs import Call, check_results
from tests.triton.mutation import load

FLAGS = (True, True, False)


def check_contrastive(kernels):
    # Near 0 logits: one entry too many or too few is one in as many as there are.
    scale = torch.tensor(0.1)
    block_n, block_m = tile_for("forward", torch.empty(1, 8))[:2]
    for beside in (-1, 0, 1):
        n, m = block_n + beside, 2 * block_m + beside
        rows, columns = keys_of(n, 8, torch.float32), keys_of(m, 8, torch.float32, seed=1)
        results = kernels.contrastive_fwd(rows, columns, scale, None, None, None, *FLAGS, True, False, False)
        exact = contrastive_by_definition(
            rows.double(), columns.double(), scale.double(), None, None, None, *FLAGS, True
        )
        for ours, right in zip(results[:2], exact[:2], strict=True):
            torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-6)
    # Ids that differ above 32 bits.
    numbers = torch.arange(6) * 2**32
    rows, columns = keys_of(6, 8, torch.float64), keys_of(6, 8, torch.float64, seed=1)
    operands = (rows, columns, scale.double(), None, numbers, numbers, *FLAGS, False)
    lse = kernels.contrastive_fwd(*operands, False, False)[0]
    torch.testing.assert_close(lse, contrastive_by_definition(*operands)[0], rtol=1e-12, atol=1e-12)
    _low_temperature(kernels)
    # Gradients beyond float16's numbers are infinite.
    rows, columns = keys_of(6, 8, torch.float16), keys_of(5, 8, torch.float16, seed=1)
    operands = (rows, columns, torch.tensor(1.0), None, None, None)
    flags = (False, False, False, False)
    lse, column_lse, _, *saved = kernels.contrastive_fwd(*operands, *flags, True, True)
    grad, *_ = kernels.contrastive_bwd(
        torch.full((6,), 1e5, dtype=torch.float64),
        None,
        None,
        *operands,
        lse,
        column_lse,
        *saved,
        *flags,
        True,
        True,
    )
    exact = 1e5 * (rows.double() @ columns.double().T).softmax(1) @ columns.double()
    require_halves(grad, exact)
    # Gradients of nothing but zeros, of which the largest is 0.
    zero = torch.zeros(6, dtype=torch.float64)
    grad, *_ = kernels.contrastive_bwd(
        zero, None, None, *operands, lse, column_lse, *saved, *flags, True, True
    )  # fmt: skip
    assert (grad == 0).all()
    # Positives that name the first column of a tile alone, and the last; no row past the end names column 0.
    rows, columns = keys_of(block_n, 8, torch.float32), keys_of(2 * block_m, 8, torch.float32, seed=1)
    for column in (0, block_m - 1, block_m):
        named = torch.full((block_n, 1), column)
        logits = kernels.contrastive_fwd(
            rows, columns, scale, named, None, None, *FLAGS, False, False, False
        )[2]
        exact = contrastive_by_definition(
            rows.double(), columns.double(), scale.double(), named, None, None, *FLAGS, False
        )[2]
        torch.testing.assert_close(logits, exact, rtol=1e-5, atol=1e-7)
    # Three positives that name one column, and norms beside 1e-12.
    rows, columns = keys_of(6, 8, torch.float64), keys_of(5, 8, torch.float64, seed=1)
    _gradients(kernels, rows, columns, torch.full((6, 3), 2))
    _gradients(kernels, short_rows(6, 8, torch.float64), columns, torch.full((6, 1), 2))


def _gradients(kernels, rows, columns, positives):
    leaves = [rows.clone().requires_grad_(), columns.clone().requires_grad_()]
    scale = torch.tensor(2.0, dtype=torch.float64)
    operands = (scale, positives, None, None)
    exact = contrastive_by_definition(*leaves, *operands, *FLAGS, False)
    grads = torch.autograd.grad(exact[0].sum() + exact[2].sum(), leaves)
    lse, column_lse, logits, *saved = kernels.contrastive_fwd(
        rows, columns, *operands, *FLAGS, False, True, True
    )
    found = kernels.contrastive_bwd(
        torch.ones_like(lse), None, torch.ones_like(logits), rows, columns, *operands, lse, column_lse, *saved,
        *FLAGS, False, True, True,
    )  # fmt: skip
    for ours, right in zip(found[:2], grads, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12 * right.abs().max().item())


def _low_temperature(kernels):
    """Logits about 8192 and exact, so that nothing but the rounding of lse is left to be wrong."""
    rows, columns = torch.zeros(3, 4), torch.zeros(40, 4)
    rows[:, 0], columns[:, 0] = 1, 1 + torch.arange(40) * 2.0**-14
    operands = (rows, columns, torch.tensor(2.0**13), None, None, None)
    lse, column_lse, _, *saved = kernels.contrastive_fwd(*operands, False, False, False, False, True, True)
    _, grad, *_ = kernels.contrastive_bwd(
        torch.ones_like(lse),
        None,
        None,
        *operands,
        lse,
        column_lse,
        *saved,
        False,
        False,
        False,
        False,
        True,
        True,
    )
    found = grad[:, 0].double() / (3 * 2**13)
    # Logits of 8192 are rounded to 5e-4, in both directions alike: the probabilities still add up to 1.
    torch.testing.assert_close(found, torch.softmax(torch.arange(40.0).double() / 2, 0), rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(found.sum().item(), 1.0, rtol=1e-5, atol=0)


def check_batch_hard(kernels):
    _doubles_in_order(kernels)
    a = 1e-30  # whose square is 0, or -0
    labels = torch.tensor([0, 0, 0, 1, 1]) * 2**33
    for signs in ([1, 1, -1, -1, 1], [1, -1, 1, 1, -1]):
        x = torch.zeros(5, 32)
        x[:, -1] = a * torch.tensor(signs)
        apart = 1e11 * x + 1e15 * torch.eye(5, 32)  # whose products are, once normalised
        for rows, normalize in ((x, False), (apart, True)):
            positive, negative = kernels.batch_hard(rows, labels, normalize, "cosine")
            assert positive.tolist() == [1, 0, 0, 4, 3] and negative.tolist() == [3, 3, 3, 0, 0]
    # A last column that counts, beside the ends of blocks and tiles.
    for size in {beside + block for block in tile_for("forward", x)[:2] for beside in (-1, 0, 1)}:
        x = torch.randint(-1, 2, (size, 32), generator=torch.Generator().manual_seed(size)).float()
        x[-1], labels = -2 * x[0], torch.arange(size) % 2
        labels[-1] = 0
        got = kernels.batch_hard(x, labels, False, "euclidean")
        for ours, right in zip(
            got, hardest_by_definition(x.double(), labels, False, "euclidean"), strict=True
        ):
            assert torch.equal(ours, right)
    # Equal keys in several splits of the walk, and a last column that counts.
    x = torch.randint(-1, 2, (575, 4), generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    labels = torch.arange(575) % 2
    x[574] = torch.tensor([2.0, 2.0, 2.0, 2.0])
    got = kernels.batch_hard(x, labels, False, "euclidean")
    for ours, right in zip(got, hardest_by_definition(x.double(), labels, False, "euclidean"), strict=True):
        assert torch.equal(ours, right)


def _doubles_in_order(kernels):
    """The hardest of float64, of keys below 0 too, and the first of those that are NaN."""
    x = torch.randint(-2, 3, (20, 16), generator=torch.Generator().manual_seed(2)).double()
    labels = torch.arange(20) % 2
    for distance in ("euclidean", "cosine"):
        got = kernels.batch_hard(x, labels, False, distance)
        for ours, right in zip(got, hardest_by_definition(x, labels, False, distance), strict=True):
            assert torch.equal(ours, right)
    x[[7, 11], 3] = torch.nan
    positive, negative = kernels.batch_hard(x, labels, False, "euclidean")
    assert positive[1] == 7 and negative[0] == 7


def check_queue_push(kernels):
    for start in (-3, 2**62):
        ring = Ring(kernels.queue_push_, 4, 8, position=start, filled=-5)
        ring.push(keys_of(3, 8, torch.float32), False)
        ring.check()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        keys = short_rows(6, 8, dtype)
        ring, position, filled = torch.zeros(9, 8, dtype=dtype), torch.tensor(0), torch.tensor(0)
        kernels.queue_push_(ring, keys, position, filled, True)
        acc = torch.promote_types(dtype, torch.float32)
        expected = torch.nn.functional.normalize(keys.to(acc), dim=1).to(dtype)
        eps = max(torch.finfo(dtype).eps, 3e-7)
        torch.testing.assert_close(ring[:6], expected, rtol=eps, atol=0)
    keys = keys_of(3, 8, torch.float32)
    keys[1, 5] = torch.nan
    keys[2, 0] = 70000
    ring = torch.zeros(4, 8)
    kernels.queue_push_(ring, keys, position, filled, True)
    # Six keys were pushed, so the next three go to rows 2, 3 and 0 of this ring.
    assert ring.isnan().all(1).tolist() == [False, False, False, True]
    assert ring.isnan().any(1).tolist() == [False, False, False, True]
    half = torch.zeros(4, 8, dtype=torch.float16)
    kernels.queue_push_(half, keys, torch.tensor(0), torch.tensor(0), False)
    assert torch.equal(half[:3].nan_to_num(7), keys.half().nan_to_num(7))


def check_row_pairs(kernels):
    for dtype in (torch.float64, torch.float32):
        x, y = short_rows(6, 8, dtype), keys_of(6, 8, dtype, seed=3)
        for measure in ("product", "distance"):
            for call in (Call(x, y, None, True, measure), Call(y, x, None, True, measure)):
                values, saved = kernels.row_pairs_fwd(call.x, call.y, None, True, measure)
                grads = kernels.row_pairs_bwd(
                    call.cotangent, call.x, call.y, None, saved, True, measure, True, True, False
                )
                check_results([values, *grads[:2]], call, "triton")
    x, y = keys_of(5, 24, torch.float16), keys_of(5, 24, torch.float16, seed=1)
    _, saved = kernels.row_pairs_fwd(x, y, None, False, "product")
    g = torch.full((5,), 5e4, dtype=torch.float64)
    grad, *_ = kernels.row_pairs_bwd(g, x, y, None, saved, False, "product", True, True, False)
    require_halves(grad, g[:, None] * y.double())


def check_momentum_update(kernels):
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float16, torch.bfloat16):
        for momentum in (0.0, 1.0):
            master, source = torch.randn(2, 300, generator=generator)
            shadow, expected = master.to(dtype), (source if momentum == 0 else master).clone()
            kernels.momentum_update_([master], [shadow], [source], torch.tensor(1 - momentum))
            assert torch.equal(master, expected) and torch.equal(shadow, expected.to(dtype))
    master = torch.tensor([70000.0, -1e6, 65519.0, 1.0])
    shadow, source = master.half(), torch.tensor([1.0, 2.0, 3.0, 4.0])
    exact = (master + source) / 2
    kernels.momentum_update_([master], [shadow], [source], torch.tensor(0.5))
    assert torch.equal(master, exact) and torch.equal(shadow, exact.half())


@contextlib.contextmanager
def far_results(kernels):
    """Kernels write each sample more than 2^31 elements behind the one before."""
    own, kernels.dense_result = kernels.dense_result, lambda result: far_apart(torch.zeros_like(result))
    try:
        yield
    finally:
        kernels.dense_result = own


def check_mixup_normalize(kernels):
    x = torch.randint(0, 256, (5, 2, 3, 4), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    operands = (torch.linspace(0.1, 0.9, 5), torch.arange(5).roll(1), torch.rand(2), torch.rand(2) + 0.1)
    right = kernels.mixup_normalize(x, *operands, torch.float32)
    with far_results(kernels):
        assert torch.equal(kernels.mixup_normalize(x, *operands, torch.float32), right)


def check_mixup(kernels):
    for count, features in ((3, 1023), (4, 1024), (5, 1025), (1025, 1)):
        x, lam = keys_of(count, features, torch.float32), torch.linspace(0, 1, count)
        permutation = torch.arange(count).roll(1)
        exact = lam[:, None].double() * x + (1 - lam[:, None].double()) * x[permutation]
        out = kernels.mixup_fwd(x, lam, permutation)
        torch.testing.assert_close(out.double(), exact, rtol=1e-6, atol=1e-6)
    # Weights of 0 beside infinite numbers, numbers at float16's end, NaN.
    x = torch.tensor([[1.0, torch.inf, -torch.inf], [2.0, 3.0, 4.0]])
    swap = torch.tensor([1, 0])
    assert torch.equal(kernels.mixup_fwd(x, torch.tensor([0.0, 1.0]), swap), x[[1, 1]])
    grad, _ = kernels.mixup_bwd(x.flip(0), None, torch.tensor([0.5, 1.0]), swap, True)
    assert torch.equal(grad[0], x[1] / 2)
    grad, _ = kernels.mixup_bwd(x, None, torch.tensor([0.0, 0.5]), swap, True)
    assert torch.equal(grad[0], x[1] / 2)
    # Results far apart, and samples that are no whole vectors apart.
    x, lam, permutation = keys_of(5, 24, torch.float32), torch.linspace(0.1, 0.9, 5), torch.arange(5).roll(1)
    right, expected = kernels.mixup_fwd(x, lam, permutation), kernels.mixup_bwd(x, x, lam, permutation, True)
    wider = torch.full((5, 30), torch.nan)[:, :24].copy_(x)
    assert torch.equal(kernels.mixup_fwd(wider, lam, permutation), right)
    with far_results(kernels):
        assert torch.equal(kernels.mixup_fwd(x, lam, permutation), right)
        assert all(map(torch.equal, kernels.mixup_bwd(x, x, lam, permutation, True), expected))
    x = torch.tensor([[65504.0, -65504.0, torch.nan], [65504.0, -65504.0, 1.0]]).half()
    out = kernels.mixup_fwd(x, torch.full((2,), 0.5), swap)
    assert torch.equal(out[:, :2], x[:, :2]) and out[:, 2].isnan().all()
    grad, _ = kernels.mixup_bwd(x[:, :2].contiguous(), None, torch.tensor([1.0, 0.0]), swap, True)
    assert torch.equal(grad[0], 2 * x[0, :2]) and (grad[1] == 0).all()
    # Numbers that are a permutation in their low bits alone.
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    kernels.mixup_(x, torch.rand(2), torch.tensor([2**32 + 1, 0]))
    assert x.flatten().tolist() == [1, 2, 3, 4]


def check_mixup_cross_entropy(kernels):
    # A first block of classes that are left out.
    logits, same = keys_of(3, 75, torch.float32), torch.arange(3) + 40
    logits[0, :32] = -torch.inf
    longest, kernels.LONGEST_BLOCK = kernels.LONGEST_BLOCK, 32
    try:
        operands = (logits, same, torch.arange(3), torch.ones(3), None, 0.0, -100, False, "none")
        loss = kernels.mixup_cross_entropy_fwd(*operands)[0]
    finally:
        kernels.LONGEST_BLOCK = longest
    exact = torch.nn.functional.cross_entropy(logits.double(), same, reduction="none")
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
    for classes in (31, 33, 4095, 4096, 4097):
        logits, target = keys_of(3, classes, torch.float32), torch.tensor([0, classes - 1, classes // 2])
        operands, options = (logits, target, torch.arange(3), torch.ones(3), None), (0.0, -100, False)
        loss, lse, _ = kernels.mixup_cross_entropy_fwd(*operands, *options, "none")
        exact = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
        torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=1e-6)
        grad = kernels.mixup_cross_entropy_bwd(torch.ones(3).double(), *operands, lse, *options)
        exact = logits.double().softmax(1) - torch.nn.functional.one_hot(target, classes)
        torch.testing.assert_close(grad.double(), exact, rtol=1e-5, atol=1e-6)
    # Gradients beyond float16's numbers, of large logits whose lse is rounded, and of labels above 32 bits.
    logits, order, ones = keys_of(3, 9, torch.float16), torch.arange(3), torch.ones(3)
    operands, options = (order, order, ones, None), (0.0, -100, False)
    grads = torch.full((3,), 3e5, dtype=torch.float64)
    lse = kernels.mixup_cross_entropy_fwd(logits, *operands, *options, "none")[1]
    grad = kernels.mixup_cross_entropy_bwd(grads, logits, *operands, lse, *options)
    require_halves(grad, 3e5 * (logits.double().softmax(1) - torch.eye(3, 9)))
    logits = keys_of(3, 9, torch.float32) + 2e4
    lse = kernels.mixup_cross_entropy_fwd(logits, *operands, *options, "none")[1]
    grad = kernels.mixup_cross_entropy_bwd(torch.ones(3).double(), logits, *operands, lse, *options)
    torch.testing.assert_close(
        grad.double(), logits.double().softmax(1) - torch.eye(3, 9), rtol=1e-5, atol=1e-6
    )
    operands = (order + 2**32, order, ones, None)
    assert (kernels.mixup_cross_entropy_fwd(logits, *operands, *options, "none")[0] == 0).all()
    # Targets of weight 0 beside infinite logits.
    logits = keys_of(2, 5, torch.float32)
    logits[0, 3] = logits[1, 1] = -torch.inf
    target, swap, lam = torch.tensor([1, 3]), torch.tensor([1, 0]), torch.ones(2)
    for classes, share in ((target, lam), (target.flip(0), 1 - lam)):
        operands = (logits, classes, swap, share, None, 0.0, -100, False, "none")
        assert kernels.mixup_cross_entropy_fwd(*operands)[0].isfinite().all()


def check_cutmix(kernels):
    for count in (15, 16, 17):
        pixels = torch.arange(count * 15.0).view(count, 1, 3, 5)
        inside, order = torch.tensor([[1, 3, 0, 4]]).expand(count, 4), torch.arange(count).roll(1)
        exact = pixels.clone()
        exact[:, :, 1:, :4] = pixels[order][:, :, 1:, :4]
        assert torch.equal(kernels.cutmix_fwd(pixels, inside, order), exact)
    grad = torch.tensor([65504.0, -40000.0, 2.0]).half().view(1, 1, 1, 3).expand(2, 1, 1, 3).contiguous()
    found = kernels.cutmix_bwd(grad, torch.tensor([[0, 0, 0, 0], [0, 1, 0, 3]]), torch.tensor([1, 0]))
    assert torch.equal(found[0], 2 * grad[0]) and (found[1] == 0).all()
    far = torch.tensor([[2**32, 2**32 + 4, 0, 7], [-(2**32), 5, -(2**32) + 3, 7]])
    x = torch.randn(2, 1, 5, 7)
    out = kernels.cutmix_fwd(x, far, torch.tensor([1, 0]))
    assert torch.equal(out, torch.stack([x[0], x[0]]))
    ends = torch.tensor([[1, 2**32, 0, 7], [0, 5, 2, 2**32]])
    exact = x.clone()
    exact[0, :, 1:], exact[1, ..., 2:] = x[1, :, 1:], x[0, ..., 2:]
    assert torch.equal(kernels.cutmix_fwd(x, ends, torch.tensor([1, 0])), exact)
    x, boxes, order = (
        torch.randn(3, 1, 4, 6),
        torch.tensor([[1, 3, 2, 5]]).expand(3, 4),
        torch.arange(3).roll(1),
    )
    right = kernels.cutmix_fwd(x, boxes, order)
    with far_results(kernels):
        assert torch.equal(kernels.cutmix_fwd(x, boxes, order), right)


def check_sigmoid_pairs(kernels):
    # Rows that keep the gradient on chip, in tiles that are all alike: their sum is a multiple of one's, to a double's
    # rounding. No positive pair.
    tiles, columns = 7, keys_of(32 * 7, 16, torch.bfloat16)
    rows = keys_of(33, 16, torch.bfloat16, seed=1)
    numbers = (torch.tensor(0.0), torch.tensor(-2.5), 2**40)
    flags = (True, True, False, False, False, False)
    one, many = (
        kernels.sigmoid_pairs_fwd(rows, some, *numbers, *flags)[0] for some in (columns[:32], columns)
    )
    torch.testing.assert_close(many, tiles * one, rtol=1e-13, atol=0)
    # Gradients of nothing but zeros, of which the largest is 0.
    rows, columns = keys_of(9, 17, torch.float16), keys_of(7, 17, torch.float16, seed=1)
    grads = kernels.sigmoid_pairs_bwd(
        torch.zeros(9, dtype=torch.float64),
        rows,
        columns,
        *numbers,
        True,
        True,
        True,
        True,
        None,
        None,
        False,
    )
    assert all((grad == 0).all() for grad in grads)


CHECKS = {
    name.removeprefix("check_"): check
    for name, check in list(globals().items())
    if name.startswith("check_") and name != "check_results"
}

# Identities, labels and partners above 32 bits, and float16's end.
WIDE = [
    ("contrastive", "common", "row_ids[:, None] == column_ids[None, :]",
     "row_ids[:, None].to(tl.int32) == column_ids[None, :].to(tl.int32)"),
    ("contrastive", "contrastive_bwd", "(scale * gradient).to(grad_ptr.dtype.element_ty)",
     "tl.clamp(scale * gradient, -65504.0, 65504.0).to(grad_ptr.dtype.element_ty)"),
    ("batch_hard", "batch_hard", "row_labels[:, None] == labels[None, :]",
     "row_labels[:, None].to(tl.int32) == labels[None, :].to(tl.int32)"),
    ("queue_push", "queue_push", "(x * factor).to(storage_ptr.dtype.element_ty)",
     "tl.clamp(x * factor, -65504.0, 65504.0).to(storage_ptr.dtype.element_ty)"),
    ("row_pairs", "row_pairs", "(factor * grad).to(grad_ptr.dtype.element_ty)",
     "tl.clamp(factor * grad, -65504.0, 65504.0).to(grad_ptr.dtype.element_ty)"),
    ("mixup", "mixup", "next * partner.to(own.dtype), mixed).to(x.dtype)",
     "next * partner.to(own.dtype), tl.clamp(mixed, -65504.0, 65504.0)).to(x.dtype)"),
    ("mixup", "permutation_walk", "(partner >= 0) & (partner < B)",
     "(partner.to(tl.int32) >= 0) & (partner.to(tl.int32) < B)"),
    ("cutmix", "cutmix", "(own.to(ACC) + given.to(ACC)).to(own.dtype)",
     "tl.clamp(own.to(ACC) + given.to(ACC), -65504.0, 65504.0).to(own.dtype)"),
    ("mixup_cross_entropy", "mixup_cross_entropy", "grad.to(grad_ptr.dtype.element_ty)",
     "tl.clamp(grad, -65504.0, 65504.0).to(grad_ptr.dtype.element_ty)"),
    ("mixup_cross_entropy", "mixup_cross_entropy", "* (correction * mass.to(ACC))", "* mass.to(ACC)"),
    ("mixup_cross_entropy", "mixup_cross_entropy", "(label >= 0) & (label < C)",
     "(label.to(tl.int32) >= 0) & (label.to(tl.int32) < C)"),
]  # fmt: skip
# Triton 3.6 compiles -x of a NaN to a positive NaN, which is above all as its bits are.
NOT_IN_3_6 = "order = tl.where(key != key, 0x7FFFFFFFFFFFFFFF, order)"
# Rows, results and positives of one kind alone, which slow tests try.
RARE = [
    ("mixup", "mixup", "tl.where(own == 0.0, next * partner.to(own.dtype), mixed)", "mixed"),
    ("mixup", "mixup", "stride_grad_x = stride_grad_x.to(tl.int64) * VECTOR", "stride_grad_x = stride_grad_x * VECTOR"),
    ("mixup", "samples", "*(batch.stride(0) for batch in batches)", ""),
    ("mixup_normalize", "mixup_normalize", "stride_out.to(tl.int64) * VECTOR_OUT", "stride_out * VECTOR_OUT"),
    ("mixup_cross_entropy", "mixup_cross_entropy", "shift = finite_shift(larger)", "shift = larger"),
    ("cutmix", "cutmix", "tl.load(box_ptr + stride_end)", "tl.load(box_ptr + stride_end).to(tl.int32)"),
    ("cutmix", "cutmix", "tl.load(box_ptr + 3 * stride_end)", "tl.load(box_ptr + 3 * stride_end).to(tl.int32)"),
    ("cutmix", "cutmix", "stride_out = stride_out.to(tl.int64) * VECTOR", "stride_out = stride_out * VECTOR"),
    ("contrastive", "contrastive_fwd", "(highest >= m0)", "(highest > m0)"),
    ("contrastive", "contrastive_fwd", "(lowest < m0 + BLOCK_M)", "(lowest + 1 < m0 + BLOCK_M)"),
    ("contrastive", "contrastive", ".clamp_min(1e-30)", ""),
    ("sigmoid_pairs", "sigmoid_pairs", ".clamp_min(1e-30)", ""),
    ("batch_hard", "batch_hard", "order = bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)", "order = bits"),
    ("batch_hard", "batch_hard", NOT_IN_3_6, "order = order"),
    ("queue_push", "queue_push", "tl.where(index < 0, index + size, index)", "index"),
    ("queue_push", "queue_push", "tl.where(filled < 0, 0, filled)", "filled"),
]  # fmt: skip
MUTATIONS = [
    *WIDE,
    *RARE,
    ("contrastive", "common", "outside = tl.where(columns < M,", "outside = tl.where(columns < M + 1,"),
    ("contrastive", "contrastive_bwd", "factor = tl.where(empty, 1.0, exp2(",
     "factor = tl.where(empty, 1.0, exp2(0.0 * "),
    ("contrastive", "contrastive_bwd", "coefficients += tl.where(index[:, None] == columns",
     "coefficients = coefficients * 0.0 + tl.where(index[:, None] == columns"),
    ("contrastive", "common", "1.0 / tl.maximum(tl.sqrt(squared_norm), tl.full([], NORM_EPS, ACC))",
     "1.0 / tl.maximum(tl.sqrt(squared_norm), tl.full([], 1.05e-12, ACC))"),
    ("batch_hard", "batch_hard", "    key = tl.where(key == 0.0, 0.0, key)\n", ""),
    ("batch_hard", "batch_hard", ".amin(0)", ".amax(0)"),
    ("batch_hard", "batch_hard", "inside = (columns < N)[None, :]", "inside = (columns < N - 1)[None, :]"),
    ("queue_push", "queue_push", "tl.where(norm < eps, eps, norm)", "tl.maximum(norm, eps)"),
    ("queue_push", "common", "    constants.NORM_EPS", "    1.05 * constants.NORM_EPS"),
    ("row_pairs", "common", "    constants.NORM_EPS", "    1.05 * constants.NORM_EPS"),
    ("row_pairs", "row_pairs", "0.999999e12", "0.95e12"),
    ("momentum_update", "momentum_update", "near = weight < 0.5", "near = weight < 2.0"),
    ("momentum_update", "momentum_update", "rounded == written", "(rounded == written) & (written < 65504.0)"),
    ("mixup", "mixup", "tl.where(next == 0.0, own * x.to(own.dtype), mixed)", "mixed"),
    ("mixup_cross_entropy", "mixup_cross_entropy", "used = weight != 0.0", "used = weight >= 0.0"),
    ("cutmix", "cutmix", "begin + SAMPLES, B)", "begin + SAMPLES, B - 1)"),
    ("cutmix", "cutmix", "tl.minimum(tl.maximum(tl.load(box_ptr), 0), H)",
     "tl.minimum(tl.maximum(tl.load(box_ptr).to(tl.int32), 0), H)"),
    ("sigmoid_pairs", "sigmoid_pairs", "losses += tl.sum(pair_losses(u, decay, counts), axis=1).to(tl.float64)",
     "losses = (losses.to(tl.float32) + tl.sum(pair_losses(u, decay, counts), axis=1)).to(tl.float64)"),
]  # fmt: skip


@pytest.mark.parametrize("operation", CHECKS)
def test_edges(gpu, operation):
    if not gpu.emulated:
        pytest.skip("its tensors lie in memory of the host")
    with gpu.triton():
        CHECKS[operation](importlib.import_module(f"ssl_kernels.triton.{operation}"))


@pytest.mark.parametrize(
    "operation, file, old, new",
    [
        pytest.param(*mutation, marks=[pytest.mark.slow] * (mutation in (*WIDE, *RARE)))
        for mutation in MUTATIONS
    ],
)
def test_mutation_is_noticed(tmp_path, monkeypatch, operation, file, old, new):
    if old == NOT_IN_3_6 and triton.__version__.startswith("3.6."):
        pytest.skip("changes nothing with this Triton")
    monkeypatch.syspath_prepend(tmp_path)
    broken = load(tmp_path, operation, file, old, new)
    with emulated_triton(80), pytest.raises((AssertionError, PtxError)):
        CHECKS[operation](broken)
