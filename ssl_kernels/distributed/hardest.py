"""Each row's farthest row of its label and nearest row of another, among the rows of all ranks."""

import torch

from ssl_kernels.chunked.rows import LOGITS_PER_BLOCK
from ssl_kernels.distributed.once import once
from ssl_kernels.distributed.pairs import breaking_the_graph
from ssl_kernels.distributed.transport import Sum


class _Hardest(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, labels, distance, setting, sizes):
        transport = setting.transport(sizes)
        start = sum(sizes[: setting.rank])
        own = torch.arange(start, start + x.shape[0], device=x.device)
        held = transport.collect(x, labels, own)
        # Keys are compared as in `batch_hard`: half the squared length less the product.
        # Of the farthest positive negated, of the nearest negative.
        keys = x.new_full((2, x.shape[0]), torch.inf)
        index = torch.full((2, x.shape[0]), -1, dtype=torch.int64, device=x.device)
        rows = x.expand(2, *x.shape).clone()

        def meet(y, their_labels, theirs):
            if not x.shape[0] or not y.shape[0]:
                return
            half = y.square().sum(1) / 2 if distance == "euclidean" else y.new_zeros(y.shape[0])
            finite = torch.finfo(y.dtype)
            size = max(1, LOGITS_PER_BLOCK // y.shape[0])
            for begin in range(0, x.shape[0], size):
                span = slice(begin, min(begin + size, x.shape[0]))
                similar = (half - x[span] @ y.T).clamp(finite.min, finite.max)
                same = labels[span, None] == their_labels[None, :]
                positive = same & (own[span, None] != theirs[None, :])
                for which, key, allowed in ((0, -similar, positive), (1, similar, ~same)):
                    best, at = key.masked_fill(~allowed, torch.inf).min(1)  # inf: none is allowed
                    best = best.masked_fill(best.isnan(), -torch.inf)  # NaN is found before every number
                    found = theirs.index_select(0, at)
                    known = index[which, span]
                    better = (best < keys[which, span]) | ((best == keys[which, span]) & (found < known))
                    keys[which, span] = best.where(better, keys[which, span])
                    index[which, span] = found.where(better, known)
                    rows[which, span] = y.index_select(0, at).where(better[:, None], rows[which, span])

        others, behind = sum(sizes) - sizes[setting.rank], sum(sizes[setting.rank + 1 :])

        def visit(block, part, first):
            # `min` finds the first of equals, which is that of the least number where numbers grow: all others at once
            # begin with those behind this rank.
            cut = behind if not first and block[0].shape[0] == others else 0
            for span in (slice(0, cut), slice(cut, None)):
                meet(*(each[span] for each in block))

        with torch.autocast(x.device.type, enabled=False):
            transport.walk(held, visit)
        complete = (index >= 0).all(0)
        rows = rows.where(complete[:, None], x)
        ctx.save_for_backward(index.where(complete, -1), own)
        ctx.options = setting, sizes
        ctx.mark_non_differentiable(complete)
        return rows[0].clone(), rows[1].clone(), complete

    @staticmethod
    @once
    def backward(ctx, grad_positive, grad_negative, _):
        index, own = ctx.saved_tensors
        setting, sizes = ctx.options
        grads = torch.cat((grad_positive, grad_negative))
        index = index.flatten()
        everyones = sum(sizes)

        def visit(block, part, first):
            (theirs,) = block
            rows = theirs.shape[0]
            if not rows or not grads.shape[0]:
                return [grads.new_zeros(rows, grads.shape[1])]
            at = (index - theirs[0]) % everyones  # blocks hold neighbours, and after the last row comes row 0
            meant = (index >= 0) & (at < rows)
            at = at.where(meant, rows)
            # As the gradient of F.embedding: summed in one order, as index_add_ is not.
            summed = torch.ops.aten.embedding_dense_backward(grads, at, rows + 1, rows, False)
            return [summed[:rows]]

        transport = setting.transport(sizes)
        (grad,) = transport.walk(transport.collect(own), visit, Sum, [grads[:0]], own_last=True)
        # Rows without a triplet stood for themselves.
        alone = (index < 0).view(2, -1, 1)
        grad = grad + (grads.view(2, -1, grads.shape[1]) * alone).sum(0)
        return grad, None, None, None, None


@breaking_the_graph
def hardest_rows(x, labels, distance, setting, sizes):
    """(positives (n, D), negatives (n, D), complete (n,) bool): the row itself where there is no triplet.

    Args:
        x: (n, D) rows of this rank in the accumulation dtype, normalised if they are to be.
        labels: (n,) int64.
        distance: "euclidean" or "cosine".
    """
    return _Hardest.apply(x, labels, distance, setting, sizes)
