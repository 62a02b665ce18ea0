"""`cluster_cross_entropy` in plain PyTorch, a block of samples at a time.

Softmax and target of a view meet as logits, before the products that make gradients of them, so that what is left where
they nearly cancel keeps its digits. A block is as large as stays in the caches, but no smaller than what the products
with the prototypes need to be worth reading them; its logits and those of the teacher have one place for all blocks.
"""

import torch

from ssl_kernels.chunked.rows import input_gradient, unit_rows, without_autocast

LOGITS_PER_BLOCK = 1 << 19  # 2 MB in float32
LEAST_ROWS = 64


@without_autocast
def cluster_cross_entropy(
    rows,
    prototypes,
    scale,
    teacher_rows,
    teacher_columns,
    biases,
    weights,
    views,
    pairs,
    normalize_rows,
    normalize_columns,
    rows_need_grad,
    prototypes_need_grad,
):
    n = rows.shape[0] // views
    unit, rnorm = unit_rows(rows, normalize_rows)
    columns, column_rnorm = unit_rows(prototypes, normalize_columns)
    k, d = columns.shape
    by_view, teachers = unit.view(views, n, d), teacher_rows.view(-1, n, teacher_rows.shape[1])
    of_view = [
        tuple(a for a, v in zip(pairs[::2], pairs[1::2], strict=True) if v == view) for view in range(views)
    ]
    losses = torch.empty(n, dtype=torch.float64, device=rows.device)
    grad_rows = torch.empty_like(by_view) if rows_need_grad else unit.new_empty(0)
    grad_columns = torch.zeros_like(columns) if prototypes_need_grad else unit.new_empty(0)
    grad_scale = torch.zeros((), dtype=torch.float64, device=rows.device)
    samples = min(n, max(1, LOGITS_PER_BLOCK // (k * views), LEAST_ROWS // views))
    places = unit.new_empty(views * samples * k), unit.new_empty(len(teachers) * samples * k)
    share = 2 / len(pairs)  # pairs has both numbers of each
    for start in range(0, n, samples):
        block = slice(start, min(start + samples, n))
        count = block.stop - start
        part = by_view[:, block].reshape(-1, d)
        logits, codes = (
            place[: len(many) * count * k].view(-1, k)
            for place, many in zip(places, (by_view, teachers), strict=True)
        )
        torch.mm(teachers[:, block].reshape(-1, teachers.shape[2]), teacher_columns.T, out=codes)
        codes = codes.view(-1, count, k)
        if biases is not None:
            codes += biases[:, None]
        softmax_(codes)
        torch.mm(scale * part, columns.T, out=logits)
        targets = {of: _sum(codes, of) for of in set(of_view) if of}
        by_logits = logits.view(views, count, k)
        losses[block] = (share * _losses(by_logits, of_view, targets)).clamp_min_(
            0
        )  # below it by rounding alone
        if weights is None:
            continue
        for logits_of, of in zip(by_logits, of_view, strict=True):
            if not of:
                logits_of.zero_()
                continue
            if len(of) > 1:
                logits_of.mul_(len(of))
            logits_of.sub_(targets[of])
        weight = (share * weights[block]).to(unit.dtype).repeat(views)[:, None]
        by_part = (logits @ columns).mul_(weight)
        grad_scale += (by_part * part).sum(dtype=torch.float64)
        if rows_need_grad:
            grad_rows[:, block] = by_part.mul_(scale).view(views, count, d)
        if prototypes_need_grad:
            grad_columns.addmm_(logits.T, part.mul(scale * weight))
    if rows_need_grad:
        grad_rows = input_gradient(grad_rows.view(-1, d), unit, rnorm).to(rows.dtype)
    if prototypes_need_grad:
        grad_columns = input_gradient(grad_columns, columns, column_rnorm).to(prototypes.dtype)
    return losses, grad_rows.to(rows.dtype), grad_columns.to(prototypes.dtype), grad_scale.to(unit.dtype)


def softmax_(logits):
    """softmax over the last dimension, in place."""
    return torch.ops.aten._softmax.out(logits, logits.dim() - 1, False, out=logits)


def _sum(codes, of):
    """The sum of the probabilities of some of the teacher's views."""
    if len(of) == 1:
        return codes[of[0]]
    total = codes[of[0]] + codes[of[1]]
    for a in of[2:]:
        total += codes[a]
    return total


def _losses(logits, of_view, targets):
    """(count,) float64 sums over the views; the softmax takes the place of the logits.

    The largest probability is exp(largest logit − lse), which gives the lse without a pass of its own.
    """
    total = 0
    top = logits.amax(2).double()
    for view, of in enumerate(of_view):
        if of:
            total = total - torch.linalg.vecdot(logits[view], targets[of]).double()
    softmax_(logits)
    lse = top - logits.amax(2).double().log()
    for view, of in enumerate(of_view):
        if of:
            total = total + len(of) * lse[view]
    return total
