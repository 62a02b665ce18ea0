"""The mean of the rows that a row has marked, wherever they are: by several labels a row, or by a matrix."""

import torch

from ssl_kernels.chunked.rows import LOGITS_PER_BLOCK
from ssl_kernels.distributed.once import once
from ssl_kernels.distributed.pairs import breaking_the_graph
from ssl_kernels.distributed.transport import Sum


def _marked(marks, own, block):
    """(spans of this rank's rows, and for each which rows of the block it has marked, bool).

    Args:
        marks: (n, W) int64 bit sets, compared with those of the block; or (n, N) bool.
        own: (n,) the numbers of these rows in the global batch.
        block: Numbers of its rows, and of bit sets theirs.
    """
    theirs, *their_marks = block
    size = max(1, LOGITS_PER_BLOCK // max(1, theirs.shape[0]))
    for begin in range(0, own.shape[0], size):
        span = slice(begin, min(begin + size, own.shape[0]))
        if marks.dtype == torch.bool:
            marked = marks[span].index_select(1, theirs)
        else:
            marked = torch.zeros((), dtype=torch.bool, device=own.device)
            for mine, word in zip(marks[span].unbind(1), their_marks[0].unbind(1), strict=True):
                marked = marked | ((mine[:, None] & word) != 0)
        yield span, marked & (own[span, None] != theirs)


class _MarkedMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, marks, setting, sizes):
        transport = setting.transport(sizes)
        start = sum(sizes[: setting.rank])
        own = torch.arange(start, start + rows.shape[0], device=rows.device)
        travelling = [own] if marks.dtype == torch.bool else [own, marks]
        held = transport.collect(*travelling, rows)
        sums = torch.zeros_like(rows)
        counts = rows.new_zeros(rows.shape[0], dtype=torch.float64)

        def visit(block, part, first):
            *numbers, y = block
            for span, marked in _marked(marks, own, numbers):
                sums[span] += marked.to(rows.dtype) @ y
                counts[span] += marked.sum(1)

        with torch.autocast(rows.device.type, enabled=False):
            transport.walk(held, visit)
        inverse = counts.reciprocal().where(counts > 0, 0).to(rows.dtype)
        ctx.save_for_backward(marks, own, inverse)
        ctx.options = setting, sizes
        ctx.mark_non_differentiable(counts)
        return sums * inverse[:, None], counts

    @staticmethod
    @once
    def backward(ctx, grad, _):
        marks, own, inverse = ctx.saved_tensors
        setting, sizes = ctx.options
        transport = setting.transport(sizes)
        grad = grad * inverse[:, None]

        def visit(block, part, first):
            found = grad.new_zeros(block[0].shape[0], grad.shape[1])
            for span, marked in _marked(marks, own, block):
                found += marked.T.to(grad.dtype) @ grad[span]
            return [found]

        travelling = [own] if marks.dtype == torch.bool else [own, marks]
        with torch.autocast(grad.device.type, enabled=False):
            (found,) = transport.walk(transport.collect(*travelling), visit, Sum, [grad[:0]], own_last=True)
        return found, None, None, None


@breaking_the_graph
def marked_mean(rows, marks, setting, sizes):
    """(the mean of the other rows that each row has marked (n, D), 0 of none; how many they are (n,) float64).

    Args:
        rows: (n, D) of this rank in the accumulation dtype. Gets its gradient.
        marks: (n, W) int64, W words of labels a bit each: rows that share one mark each other. (n, N) bool: each row's
            marks among the rows of all ranks, in rank order.
    """
    return _MarkedMean.apply(rows, marks, setting, sizes)
