"""`cluster_cross_entropy` in plain PyTorch, a block of samples at a time.

Softmax and target of a view meet as logits, before the products that make gradients of them, so that what is left where
they nearly cancel keeps its digits. A block is as large as stays in the caches, but no smaller than what the products
with the prototypes need to be worth reading them; its logits and those of the teacher have one place for all blocks.
"""

import torch

from ssl_kernels.chunked.rows import input_gradient_, unit_rows, without_autocast

LOGITS_PER_BLOCK = 1 << 19  # 2 MB in float32
LEAST_ROWS = 64


@without_autocast
def cluster_cross_entropy(*args):
    return in_blocks(cluster_rows_, *args)


@torch.no_grad()  # an exported program calls the operator itself, with rows that need a gradient
def in_blocks(
    run_rows,
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
    less_entropy,
    rows_need_grad,
    prototypes_need_grad,
):
    """`cluster_cross_entropy` with a function for the rows of a block, of the contract of `cluster_rows_`."""
    n = rows.shape[0] // views
    unit, rnorm = unit_rows(rows, normalize_rows)
    columns, column_rnorm = unit_rows(prototypes, normalize_columns)
    k, d = columns.shape
    by_view, teachers = unit.view(views, n, d), teacher_rows.view(-1, n, teacher_rows.shape[1])
    losses = torch.empty(n, dtype=torch.float64, device=rows.device)
    grad_rows = torch.empty_like(by_view) if rows_need_grad else unit.new_empty(0)
    grad_columns = torch.zeros_like(columns) if prototypes_need_grad else unit.new_empty(0)
    grad_scale = torch.zeros((), dtype=torch.float64, device=rows.device)
    samples = min(n, max(1, LOGITS_PER_BLOCK // (k * views), LEAST_ROWS // views))
    places = unit.new_empty(views * samples * k), unit.new_empty(len(teachers) * samples * k)
    share = 2 / len(pairs)  # pairs has both numbers of each
    biases = None if biases is None else biases.contiguous()
    for start in range(0, n, samples):
        block = slice(start, min(start + samples, n))
        count = block.stop - start
        part = by_view[:, block].reshape(-1, d)
        logits, codes = (
            place[: len(many) * count * k].view(-1, k)
            for place, many in zip(places, (by_view, teachers), strict=True)
        )
        by_block = logits.view(views, count, k), codes.view(-1, count, k)
        torch.mm(teachers[:, block].reshape(-1, teachers.shape[2]), teacher_columns.T, out=codes)
        torch.mm(scale * part, columns.T, out=logits)
        of_block = run_rows(*by_block, biases, pairs, weights is not None, less_entropy)
        losses[block] = of_block.mul_(share).clamp_min_(0)  # below it by rounding alone
        if weights is None:
            continue
        weight = (share * weights[block]).to(unit.dtype).repeat(views)[:, None]
        by_part = (logits @ columns).mul_(weight)
        grad_scale += (by_part * part).sum(dtype=torch.float64)
        if rows_need_grad:
            grad_rows[:, block] = by_part.mul_(scale).view(views, count, d)
        if prototypes_need_grad:
            grad_columns.addmm_(logits.T, part.mul(scale * weight))
    if rows_need_grad:
        grad_rows = input_gradient_(grad_rows.view(-1, d), unit, rnorm).to(rows.dtype)
    if prototypes_need_grad:
        grad_columns = input_gradient_(grad_columns, columns, column_rnorm).to(prototypes.dtype)
    return losses, grad_rows.to(rows.dtype), grad_columns.to(prototypes.dtype), grad_scale.to(unit.dtype)


def cluster_rows_(logits, codes, biases, pairs, differentiate, less_entropy):
    """(N,) float64 sums over the pairs (a, v) of lse(logits_v) − <softmax(codes_a + bias), logits_v>.

    The codes become the probabilities, and with `differentiate` the logits the gradient by them; else what comes.

    Args:
        logits: (V, N, K).
        codes: (A, N, K), logits of the teacher's views.
        biases: (A, K), (1, K) or None.
        pairs: a, v, a, v, and so on.
        less_entropy: Whether the entropies of the softmax of the codes are taken off.
    """
    if biases is not None:
        codes += biases[:, None]
    total = 0
    if less_entropy:
        logarithms = torch.log_softmax(codes, 2)
        torch.exp(logarithms, out=codes)
        minus_entropies = (codes * logarithms.masked_fill_(codes == 0, 0)).sum(2, dtype=torch.float64)
        total = sum(minus_entropies[a] for a in pairs[::2])
    else:
        softmax_(codes)
    of_view = teachers_of_views(pairs)
    targets = {of: summed_codes(codes, of) for of in set(of_view.values())}
    # The largest probability is exp(largest logit − lse), which gives the lse without a pass of its own.
    top = logits.amax(2).double()
    for view, of in of_view.items():
        total = total - torch.linalg.vecdot(logits[view], targets[of]).double()
    softmax_(logits)
    lse = top - logits.amax(2).double().log()
    for view, of in of_view.items():
        total = total + len(of) * lse[view]
    if differentiate:
        for view, by_logits in enumerate(logits):
            of = of_view.get(view)
            if of is None:
                by_logits.zero_()
                continue
            if len(of) > 1:
                by_logits.mul_(len(of))
            by_logits.sub_(targets[of])
    return total


def softmax_(logits):
    """softmax over the last dimension, in place."""
    return torch.ops.aten._softmax.out(logits, logits.dim() - 1, False, out=logits)


def teachers_of_views(pairs):
    """{view of the student: the teacher's views that it meets} of a, v, a, v, and so on."""
    of_view = {}
    for a, v in zip(pairs[::2], pairs[1::2], strict=True):
        of_view[v] = (*of_view.get(v, ()), a)
    return of_view


def summed_codes(codes, of):
    """The sum of the probabilities of some of the teacher's views."""
    if len(of) == 1:
        return codes[of[0]]
    total = codes[of[0]] + codes[of[1]]
    for a in of[2:]:
        total += codes[a]
    return total
