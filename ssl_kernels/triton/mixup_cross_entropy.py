"""Triton kernels of `mixup_cross_entropy`; docs/mixing.md is the contract."""

import torch
import triton
import triton.language as tl

from ssl_kernels.triton.common import LOG2E, exp2, finite_shift
from ssl_kernels.triton.samples import vector_of

# Most classes that a program takes at once.
LONGEST_BLOCK = 4096
MOST_CLASSES = 65535 * LONGEST_BLOCK  # a grid's second dimension has as many blocks


@triton.jit
def target_weights(
    target_ptr, permutation_ptr, stride_permutation, lam_ptr, stride_lam, smoothing, row, N, C
):
    """Classes of a row and of its partner with their weights, float64; what is out of range has weight 0."""
    partner = tl.load(permutation_ptr + row * stride_permutation)
    known = (partner >= 0) & (partner < N)
    own_class = tl.load(target_ptr + row)
    partner_class = tl.load(target_ptr + tl.where(known, partner, row))
    lam = tl.load(lam_ptr + row * stride_lam)
    kept = 1.0 - smoothing.to(tl.float64)
    own_valid = (own_class >= 0) & (own_class < C)
    partner_valid = known & (partner_class >= 0) & (partner_class < C)
    own_weight = tl.where(own_valid, kept * lam.to(tl.float64), 0.0)
    partner_weight = tl.where(partner_valid, kept * (1.0 - lam).to(tl.float64), 0.0)
    return own_class, own_weight, partner_class, partner_weight


@triton.jit
def weighted_logit(logits_ptr, label, weight):
    """weight · z_label; nothing is read where the weight is 0."""
    used = weight != 0.0
    return weight * tl.load(logits_ptr + tl.where(used, label, 0), mask=used, other=0).to(tl.float64)


@triton.jit(do_not_specialize=["stride_row", "N", "C"])
def mixup_cross_entropy_loss_kernel(
    logits_ptr,
    target_ptr,
    permutation_ptr,
    lam_ptr,
    loss_ptr,
    lse_ptr,
    stride_row,
    stride_permutation,
    stride_lam,
    smoothing_ptr,
    N,
    C,
    SMOOTH: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # lse = log sum_c exp z_c;   loss = lse - (1 - e) (lam z_y + (1 - lam) z_y') - e / C sum_c z_c
    #   e the smoothing, y' the partner's class.
    # Tiling: a program owns a row and takes it BLOCK classes at a time, running maximum and sum.
    # Traffic: reads C elements a row and two more sectors.
    # Numerics: exponentials and sums in the type of lam, loss and lse in float64.
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
        if SMOOTH:
            sum += tl.sum(tl.where(c < C, z, 0.0))
        maximum = larger
    lse = maximum.to(tl.float64) + tl.log(total.to(tl.float64))
    smoothing = tl.load(smoothing_ptr)
    own_class, own_weight, partner_class, partner_weight = target_weights(
        target_ptr, permutation_ptr, stride_permutation, lam_ptr, stride_lam, smoothing, row, N, C
    )
    loss = (
        lse
        - weighted_logit(row_ptr, own_class, own_weight)
        - weighted_logit(row_ptr, partner_class, partner_weight)
    )
    if SMOOTH:
        loss -= smoothing / C * sum.to(tl.float64)
    tl.store(loss_ptr + row, loss)
    tl.store(lse_ptr + row, lse)


@triton.jit(do_not_specialize=["stride_row", "N", "C"])
def mixup_cross_entropy_grad_kernel(
    grad_loss_ptr,
    logits_ptr,
    target_ptr,
    permutation_ptr,
    lam_ptr,
    lse_ptr,
    grad_ptr,
    stride_grad_loss,
    stride_row,
    stride_permutation,
    stride_lam,
    smoothing_ptr,
    N,
    C,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # dz_c = g (exp(z_c - lse) - e / C - (1 - e) (lam [c = y] + (1 - lam) [c = y'])).
    # Tiling: a program owns BLOCK classes of a row.
    # Traffic: reads and writes C elements a row.
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
    smoothing = tl.load(smoothing_ptr)
    own_class, own_weight, partner_class, partner_weight = target_weights(
        target_ptr, permutation_ptr, stride_permutation, lam_ptr, stride_lam, smoothing, row, N, C
    )
    soft_target = tl.where(c == own_class, own_weight.to(ACC), 0.0) + (smoothing / C).to(ACC)
    soft_target += tl.where(c == partner_class, partner_weight.to(ACC), 0.0)
    g = tl.load(grad_loss_ptr + row * stride_grad_loss).to(ACC)
    grad = g * (exp2((z - shift) * LOG2E) * correction - soft_target)
    tl.store(grad_ptr + row * C + c, grad.to(grad_ptr.dtype.element_ty), mask=c < C)


def unsupported(logits, *_):
    """Why these kernels cannot run a call, or None."""
    if logits.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float64, float32, float16 and bfloat16, not {logits.dtype}"
    if logits.shape[1] > MOST_CLASSES:
        return f"it takes up to {MOST_CLASSES} classes, got {logits.shape[1]}"
    return None


def _block(classes):
    block = min(LONGEST_BLOCK, max(triton.next_power_of_2(classes), 32))
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256))}


def _operands(logits, target, label_smoothing):
    """Logits with unit column stride, contiguous targets, the smoothing on the device in float64."""
    rows = logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
    smoothing = torch.full((), label_smoothing, dtype=torch.float64, device=logits.device)
    return rows, target.contiguous(), smoothing


def mixup_cross_entropy_fwd(logits, target, permutation, lam, label_smoothing):
    rows, target, smoothing = _operands(logits, target, label_smoothing)
    n, classes = logits.shape
    vector = vector_of(rows)
    loss, lse = torch.empty(2, n, dtype=torch.float64, device=logits.device)
    mixup_cross_entropy_loss_kernel[n,](
        rows,
        target,
        permutation,
        lam,
        loss,
        lse,
        rows.stride(0) // vector,
        permutation.stride(0),
        lam.stride(0),
        smoothing,
        n,
        classes // vector,
        SMOOTH=label_smoothing != 0,
        VECTOR=vector,
        **_block(classes),
    )
    return loss, lse


def mixup_cross_entropy_bwd(grad_loss, logits, target, permutation, lam, lse, label_smoothing):
    rows, target, smoothing = _operands(logits, target, label_smoothing)
    n, classes = logits.shape
    vector = vector_of(rows)
    grad_logits = torch.empty(n, classes, dtype=logits.dtype, device=logits.device)
    options = _block(classes)
    mixup_cross_entropy_grad_kernel[n, triton.cdiv(classes, options["BLOCK"])](
        grad_loss,
        rows,
        target,
        permutation,
        lam,
        lse.contiguous(),
        grad_logits,
        grad_loss.stride(0),
        rows.stride(0) // vector,
        permutation.stride(0),
        lam.stride(0),
        smoothing,
        n,
        classes // vector,
        VECTOR=vector,
        **options,
    )
    return grad_logits
