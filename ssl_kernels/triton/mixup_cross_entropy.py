"""Triton kernels of `mixup_cross_entropy`; docs/mixing.md is the contract."""

import torch
import triton
import triton.language as tl

from ssl_kernels.chunked.mixup_cross_entropy import reduced
from ssl_kernels.triton.common import LOG2E, exp2, finite_shift
from ssl_kernels.triton.samples import vector_of

# Most classes that a program takes at once.
LONGEST_BLOCK = 4096
# Registers of a thread of the loss in float64: left to itself, the compiler spills 8 bytes for one block more per
# multiprocessor.
FLOAT64_REGISTERS = 128
MOST_CLASSES = 65535 * LONGEST_BLOCK  # a grid's second dimension has as many blocks


@triton.jit
def is_present(label, ignore_index, C):
    return (label != ignore_index) & (label >= 0) & (label < C)


@triton.jit
def target_terms(
    target_ptr,
    partner_ptr,
    stride_partner,
    lam_ptr,
    stride_lam,
    weight_ptr,
    numbers_ptr,
    ignore_index,
    row,
    N,
    C,
    WEIGHTS: tl.constexpr,
    PARTNER_IS_CLASS: tl.constexpr,
):
    """Of a row in float64: y, a, y', b, s, m and what it counts in the mean, as in the kernels below.

    A class that is to be ignored or out of range has no weight.
    """
    other = tl.load(partner_ptr + row * stride_partner)
    own_class = tl.load(target_ptr + row)
    if PARTNER_IS_CLASS:
        partner_class = other
    else:
        known = (other >= 0) & (other < N)
        partner_class = tl.where(known, tl.load(target_ptr + tl.where(known, other, row)), -1)
    lam = tl.load(lam_ptr + row * stride_lam)
    smoothing = tl.load(numbers_ptr)
    kept = 1.0 - smoothing
    has_own = is_present(own_class, ignore_index, C)
    has_partner = is_present(partner_class, ignore_index, C)
    of_own = tl.where(has_own, lam.to(tl.float64), 0.0)
    of_partner = tl.where(has_partner, (1.0 - lam).to(tl.float64), 0.0)
    present = tl.where(has_own & has_partner, 1.0, of_own + of_partner)
    spread = smoothing / C * present
    if WEIGHTS:
        of_own *= tl.load(weight_ptr + tl.where(has_own, own_class, 0)).to(tl.float64)
        of_partner *= tl.load(weight_ptr + tl.where(has_partner, partner_class, 0)).to(tl.float64)
        counted = of_own + of_partner
        mass = kept * counted + tl.where(spread != 0.0, spread * tl.load(numbers_ptr + 1), 0.0)
    else:
        counted = present
        mass = present
    return own_class, kept * of_own, partner_class, kept * of_partner, spread, mass, counted


@triton.jit
def weighted_logit(logits_ptr, label, weight):
    """weight · z_label; nothing is read where the weight is 0."""
    used = weight != 0.0
    return weight * tl.load(logits_ptr + tl.where(used, label, 0), mask=used, other=0).to(tl.float64)


@triton.jit(do_not_specialize=["stride_row", "ignore_index", "N", "C"])
def mixup_cross_entropy_loss_kernel(
    logits_ptr,
    target_ptr,
    partner_ptr,
    lam_ptr,
    weight_ptr,
    numbers_ptr,
    loss_ptr,
    lse_ptr,
    counted_ptr,
    stride_row,
    stride_partner,
    stride_lam,
    ignore_index,
    N,
    C,
    SMOOTH: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PARTNER_IS_CLASS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # lse = log sum_c exp z_c;   loss = m lse - a z_y - b z_y' - s sum_c w_c z_c
    #   y' the partner's class, w the weights (1 without WEIGHTS), e the smoothing, [y] whether y is none to ignore:
    #   a = (1 - e) lam [y] w_y,   b = (1 - e) (1 - lam) [y'] w_y',   s = e / C (lam [y] + (1 - lam) [y']),
    #   m = a + b + s sum_c w_c;   counted = lam [y] w_y + (1 - lam) [y'] w_y'
    # Tiling: a program owns a row and takes it BLOCK classes at a time, running maximum and sum.
    # Traffic: reads C elements per row and two more sectors; with WEIGHTS and SMOOTH C weights, from the caches.
    # Numerics: exponentials and sums in the type of lam, loss and lse in float64.
    # numbers: e and sum_c w_c in float64.
    # stride_row and C come in vectors.
    stride_row = stride_row.to(tl.int64) * VECTOR
    C *= VECTOR
    ACC: tl.constexpr = lam_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_row
    maximum = tl.full([], float("-inf"), ACC)
    total = tl.zeros([], ACC)
    sum = tl.zeros([], ACC)
    for c0 in range(0, C, BLOCK):
        c = c0 + tl.arange(0, BLOCK)
        z = tl.load(row_ptr + c, mask=c < C, other=float("-inf")).to(ACC)
        larger = tl.maximum(maximum, tl.max(z))
        shift = finite_shift(larger)
        total = total * exp2((maximum - shift) * LOG2E) + tl.sum(exp2((z - shift) * LOG2E))
        if SMOOTH and WEIGHTS:
            weight = tl.load(weight_ptr + c, mask=c < C, other=0)
            sum += tl.sum(tl.where(weight == 0.0, 0.0, weight * z))
        elif SMOOTH:
            sum += tl.sum(tl.where(c < C, z, 0.0))
        maximum = larger
    lse = maximum.to(tl.float64) + tl.log(total.to(tl.float64))
    own_class, own_weight, partner_class, partner_weight, spread, mass, counted = target_terms(
        target_ptr, partner_ptr, stride_partner, lam_ptr, stride_lam, weight_ptr, numbers_ptr, ignore_index, row, N, C,
        WEIGHTS, PARTNER_IS_CLASS,
    )  # fmt: skip
    loss = (
        tl.where(mass != 0.0, mass * lse, 0.0)
        - weighted_logit(row_ptr, own_class, own_weight)
        - weighted_logit(row_ptr, partner_class, partner_weight)
    )
    if SMOOTH:
        loss -= tl.where(spread != 0.0, spread * sum.to(tl.float64), 0.0)
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)
    tl.store(counted_ptr + row, counted)


@triton.jit(do_not_specialize=["stride_row", "ignore_index", "N", "C"])
def mixup_cross_entropy_grad_kernel(
    grad_loss_ptr,
    logits_ptr,
    target_ptr,
    partner_ptr,
    lam_ptr,
    weight_ptr,
    numbers_ptr,
    lse_ptr,
    grad_ptr,
    stride_grad_loss,
    stride_row,
    stride_partner,
    stride_lam,
    ignore_index,
    N,
    C,
    SMOOTH: tl.constexpr,
    WEIGHTS: tl.constexpr,
    PARTNER_IS_CLASS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # dz_c = g (m exp(z_c - lse) - s w_c - a [c = y] - b [c = y']), 0 where nothing of the row counts.
    # Tiling: a program owns BLOCK classes of a row.
    # Traffic: reads and writes C elements per row.
    # Numerics: lse is taken in two parts, so that large logits cost no digits; the rest in the type of lam.
    # stride_row and C come in vectors.
    stride_row = stride_row.to(tl.int64) * VECTOR
    C *= VECTOR
    ACC: tl.constexpr = lam_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(logits_ptr + row * stride_row + c, mask=c < C, other=0).to(ACC)
    lse = tl.load(lse_ptr + row)
    shift = lse.to(ACC)
    correction = exp2((shift.to(tl.float64) - lse).to(ACC) * LOG2E)
    own_class, own_weight, partner_class, partner_weight, spread, mass, _counted = target_terms(
        target_ptr, partner_ptr, stride_partner, lam_ptr, stride_lam, weight_ptr, numbers_ptr, ignore_index, row, N, C,
        WEIGHTS, PARTNER_IS_CLASS,
    )  # fmt: skip
    everywhere = spread.to(ACC)
    if SMOOTH and WEIGHTS:
        everywhere *= tl.load(weight_ptr + c, mask=c < C, other=0)
    soft_target = tl.where(c == own_class, own_weight.to(ACC), 0.0) + everywhere
    soft_target += tl.where(c == partner_class, partner_weight.to(ACC), 0.0)
    g = tl.load(grad_loss_ptr + row * stride_grad_loss).to(ACC)
    grad = g * (exp2((z - shift) * LOG2E) * (correction * mass.to(ACC)) - soft_target)
    counts = (own_weight != 0.0) | (partner_weight != 0.0) | (spread != 0.0)
    grad = tl.where(counts, grad, 0.0)
    tl.store(grad_ptr + row * C + c, grad.to(grad_ptr.dtype.element_ty), mask=c < C)


def unsupported(logits, *_):
    """Why these kernels cannot run a call, or None."""
    if logits.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float64, float32, float16 and bfloat16, not {logits.dtype}"
    if len(logits) >= 2**31:
        return f"{len(logits)} rows are more than a grid has programs"
    if logits.shape[1] > MOST_CLASSES:
        return f"it takes up to {MOST_CLASSES} classes, got {logits.shape[1]}"
    return None


def _block(classes):
    block = min(LONGEST_BLOCK, max(triton.next_power_of_2(classes), 32))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256))}


def _operands(logits, target, partner, lam, weight, label_smoothing):
    """Logits with unit column stride, contiguous targets and weights, (label_smoothing, sum of weights) in float64."""
    rows = logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
    numbers = torch.full((2,), label_smoothing, dtype=torch.float64, device=logits.device)
    if weight is None:
        weight = lam  # which nothing reads
    else:
        weight = weight.contiguous()
        torch.sum(weight, 0, dtype=torch.float64, out=numbers[1])
    return rows, target.contiguous(), partner, lam, weight, numbers


def _options(logits, weight, label_smoothing, partner_is_class):
    vector = vector_of(logits)
    flags = {
        "SMOOTH": label_smoothing != 0,
        "WEIGHTS": weight is not None,
        "PARTNER_IS_CLASS": partner_is_class,
    }
    return {**flags, "VECTOR": vector, **_block(logits.shape[1])}


def mixup_cross_entropy_fwd(
    logits, target, partner, lam, weight, label_smoothing, ignore_index, partner_is_class, reduction
):
    rows, *operands = _operands(logits, target, partner, lam, weight, label_smoothing)
    n, classes = logits.shape
    options = _options(rows, weight, label_smoothing, partner_is_class)
    if logits.dtype == torch.float64:
        options["maxnreg"] = FLOAT64_REGISTERS
    loss, lse, counted = torch.empty(3, n, dtype=torch.float64, device=logits.device)
    mixup_cross_entropy_loss_kernel[n,](
        rows,
        *operands,
        loss,
        lse,
        counted,
        rows.stride(0) // options["VECTOR"],
        partner.stride(0),
        lam.stride(0),
        ignore_index,
        n,
        classes // options["VECTOR"],
        **options,
    )
    loss, total = reduced(loss, counted, lam.dtype, reduction)
    return loss, lse, total


def mixup_cross_entropy_bwd(
    grad_loss, logits, target, partner, lam, weight, lse, label_smoothing, ignore_index, partner_is_class
):
    rows, *operands = _operands(logits, target, partner, lam, weight, label_smoothing)
    n, classes = logits.shape
    options = _options(rows, weight, label_smoothing, partner_is_class)
    grad_logits = torch.empty(n, classes, dtype=logits.dtype, device=logits.device)
    mixup_cross_entropy_grad_kernel[n, triton.cdiv(classes, options["BLOCK"])](
        grad_loss,
        rows,
        *operands,
        lse.contiguous(),
        grad_logits,
        grad_loss.stride(0),
        rows.stride(0) // options["VECTOR"],
        partner.stride(0),
        lam.stride(0),
        ignore_index,
        n,
        classes // options["VECTOR"],
        **options,
    )
    return grad_logits
