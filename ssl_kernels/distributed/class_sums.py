"""Sums over the rows of a label, wherever they are."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ssl_kernels.distributed import groups
from ssl_kernels.losses.sup_con import _groups
from ssl_kernels.ops.library import in_turn


class Classes(NamedTuple):
    """The labels of this rank's rows among those of all."""

    number: torch.Tensor  # (n,) int64, a number from 0 on for each label of the global batch
    others: torch.Tensor  # (n,) float64, how many other rows of the global batch have it
    count: int  # of labels


def classes_of(labels, unlabelled, sizes, ranks):
    """`Classes` of int64 labels, by an all-gather of all ranks' labels: 8 bytes per row."""
    everyones = groups.all_gather_rows(labels, sizes, ranks.name)
    of_all, members = _groups(everyones)
    start = sum(sizes[: ranks.rank])
    own = slice(start, start + sizes[ranks.rank])
    number = of_all.group[own]
    others = (members.index_select(0, number) - 1).double()
    if unlabelled is not None:
        others = others.masked_fill(labels == int(unlabelled), 0)
    compiling = torch.compiler.is_compiling()
    count = everyones.shape[0] if compiling else int(of_all.group.max()) + 1
    return Classes(number, others, count)


def _sums(rows, number, count, at_once, name):
    """For each row the sum of the rows of its class on all ranks: an all-reduce of `at_once` classes at a time."""
    result = torch.zeros_like(rows)
    ordered, order = number.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(count + 1, device=rows.device))
    for first in range(0, count, at_once):
        last = min(first + at_once, count)
        if first == 0 and last == count:
            bags, offsets = order, starts[:-1]
        else:
            begin, end = int(starts[first]), int(starts[last])
            bags, offsets = order[begin:end], starts[first:last] - begin
        # One bag per class needs no atomics, and its order is that of the rows.
        sums = F.embedding_bag(bags, rows, offsets, mode="sum") if rows.shape[0] else None
        if sums is None:
            sums = rows.new_zeros(last - first, rows.shape[1])
        sums = groups.all_reduce(sums, name)
        inside = (number >= first) & (number < last)
        index = (number - first).clamp(0, last - first - 1)
        result = result + sums.index_select(0, index) * inside[:, None]
    return result


class _ClassSums(torch.autograd.Function):
    """`_sums`, a symmetric map of the rows of all ranks: backward is the same map."""

    @staticmethod
    def forward(ctx, rows, number, count, at_once, name):
        ctx.save_for_backward(number)
        ctx.options = count, at_once, name
        return _sums(rows, number, count, at_once, name)

    @staticmethod
    def backward(ctx, grad):
        (number,) = ctx.saved_tensors
        (made,) = in_turn(lambda grad: (_ClassSums.apply(grad, number, *ctx.options),), grad)
        return made, None, None, None, None


def other_rows_mean(rows, classes, sizes, name):
    """The mean of the other rows of each row's label, 0 where there are none, (n, D), differentiable.

    In memory of the largest rank's rows: classes are summed so many at a time.
    """
    at_once = classes.count if torch.compiler.is_compiling() else max(1, *sizes)
    sums = _ClassSums.apply(rows, classes.number, classes.count, at_once, name)
    inverse = classes.others.reciprocal().where(classes.others > 0, 0)
    return (sums - rows) * inverse[:, None].to(rows.dtype)
