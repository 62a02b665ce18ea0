"""Rows of this rank against the rows of all: sums over blocks, and their gradients, over a `Gather` or a `Ring`.

Gradients are those of what all ranks together differentiate: the rows that came from another rank get their part of
that rank's losses too. The gradients of scale and bias are this rank's part, which the ranks' sum makes whole.
"""

import functools
from typing import NamedTuple

import torch
from torch import distributed as dist

from ssl_kernels.distributed import operators
from ssl_kernels.distributed.groups import Ranks
from ssl_kernels.distributed.once import once
from ssl_kernels.distributed.transport import EVERY, TRANSPORTS, LogSum, Sum
from ssl_kernels.ops.library import accumulation_dtype, distinct


class Setting(NamedTuple):
    """How a loss runs; what an autograd.Function is handed as it is, under torch.compile too."""

    backend: str
    normalize: bool
    strategy: str
    rank: int
    world: int
    name: str  # of the group

    def transport(self, sizes):
        ranks = Ranks(self.rank, self.world, self.name)
        group = None
        if self.strategy == "ring":
            group = dist.distributed_c10d._resolve_process_group(self.name)
        return TRANSPORTS[self.strategy](group, ranks, sizes)


def breaking_the_graph(function):
    """`function(..., setting, ...)`, of which torch.compile traces a gather and leaves a ring to run as it is."""
    uncompiled = torch._disable_dynamo(function)

    @functools.wraps(function)
    def run(*args, **options):
        setting = next(each for each in args if isinstance(each, Setting))
        if setting.strategy == "ring" and torch.compiler.is_compiling():
            return uncompiled(*args, **options)
        return function(*args, **options)

    return run


def widened(rows):
    """Rows as the kernels take them: on the CPU in the accumulation dtype, so that a gradient is rounded once."""
    return rows if rows.is_cuda else rows.to(accumulation_dtype(rows))


def _gradient(like, rows=None):
    shape = like.shape if rows is None else (rows, *like.shape[1:])
    return like.new_zeros(shape, dtype=accumulation_dtype(like))


def _added(total, part, found, like):
    """A gradient of rows `like`, None at first, and what was found for a part of them."""
    if total is None:
        if part == EVERY:
            return found.to(accumulation_dtype(like))
        total = _gradient(like)
    total[part] += found
    return total


def _or_zeros(grad, like):
    return torch.zeros_like(like) if grad is None else grad


class _LogSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, columns, scale, positives, row_ids, column_ids, both, sizes, setting):
        square = columns is None
        transport = setting.transport(sizes)
        own = rows if square else columns
        held = transport.collect(own, *([] if column_ids is None else [column_ids]))
        x = widened(rows)
        lse = x.new_full((x.shape[0],), -torch.inf, dtype=torch.float64)
        logits = lse.new_empty((0,) if positives is None else positives.shape)
        both = both or square
        normalize = (setting.normalize,) * 2
        # A ring's memory would grow with what is kept.
        keep = None
        if setting.strategy == "gather" and any(ctx.needs_input_grad):
            keep = square or ctx.needs_input_grad[1]
        kept = {True: [], False: []}  # of the own block, which is the last in backward, and of the others

        def visit(block, part, first):
            nonlocal lse, logits
            among_themselves = square and first
            y = widened(block[0])
            mine = x[part]
            if not mine.shape[0] or not y.shape[0]:
                return LogSum.nothing([lse], y.shape[0]) if both else None
            marks = _marks(positives, row_ids, column_ids, block, part, square, first)
            results = operators.contrastive_fwd(
                setting.backend,
                mine,
                None if among_themselves else y,
                scale,
                marks,
                normalize,
                both=both and not among_themselves,
                keep=keep,
                own=first and positives is not None,
            )
            if keep is not None:
                kept[first].extend(results[3:])
            if part == EVERY:
                lse = torch.logaddexp(lse, results[0])
            else:
                begin = part.start or 0
                end = begin + mine.shape[0]
                lse = torch.cat((lse[:begin], torch.logaddexp(lse[part], results[0]), lse[end:]))
            if first and positives is not None:
                logits = results[2]
            return [results[1]] if both and not among_themselves else None

        found = transport.walk(
            held, visit, LogSum if both else None, [lse[:0]], symmetric=square, at_once=not both
        )
        column_lse = lse.new_empty(0)
        if square:
            lse = torch.logaddexp(lse, found[0])
        elif both:
            column_lse = found[0]
        ctx.save_for_backward(
            rows, scale, positives, row_ids, column_ids, lse, column_lse, *held, *kept[True], *kept[False]
        )
        ctx.options = square, both, (len(kept[True]), len(kept[False])), sizes, setting
        ctx.set_materialize_grads(False)
        return lse, column_lse, logits

    @staticmethod
    @once
    def backward(ctx, grad_lse, grad_column_lse, grad_logits):
        rows, scale, positives, row_ids, column_ids, lse, column_lse, *held = ctx.saved_tensors
        square, both, counts, sizes, setting = ctx.options
        held, kept = held[: len(held) - sum(counts)], held[len(held) - sum(counts) :]
        kept = {True: iter(kept[: counts[0]]), False: iter(kept[counts[0] :])}
        transport = setting.transport(sizes)
        x = widened(rows)
        grad_lse = _or_zeros(grad_lse, lse)
        if square:
            travelling = (lse, grad_lse)
        else:
            travelling = (column_lse, _or_zeros(grad_column_lse, column_lse)) if both else ()
        if travelling:
            held = [*held, *transport.collect(torch.stack(travelling, 1))]
        rows_need_grad, columns_need_grad = ctx.needs_input_grad[:2]
        columns_need_grad = rows_need_grad if square else columns_need_grad
        grad_rows, grad_scale = None, torch.zeros_like(scale)
        normalize = (setting.normalize,) * 2

        def visit(block, part, first):
            nonlocal grad_rows, grad_scale
            among_themselves = square and first
            y, mine = widened(block[0]), x[part]
            if not mine.shape[0] or not y.shape[0]:
                return [_gradient(y)] if columns_need_grad else None
            column_sums, grad_columns = (block[-1].unbind(1)) if both else (lse.new_empty(0), None)
            if among_themselves:
                column_sums, grad_columns = lse.new_empty(0), None
            part_rows, part_columns, part_scale = operators.contrastive_bwd(
                setting.backend,
                (grad_lse[part], grad_columns, grad_logits if first else None),
                mine,
                None if among_themselves else y,
                scale,
                _marks(positives, row_ids, column_ids, block, part, square, first),
                (lse[part], column_sums),
                [next(kept[first]) for _ in range(3)] if sum(counts) else None,
                normalize,
                (rows_need_grad, columns_need_grad and not among_themselves),
                both=both and not among_themselves,
                own=first and positives is not None,
            )
            grad_scale = grad_scale + part_scale
            if rows_need_grad:
                grad_rows = _added(grad_rows, part, part_rows, rows)
            if not columns_need_grad:
                return None
            return None if among_themselves else [part_columns.to(accumulation_dtype(rows))]

        combine = Sum if columns_need_grad else None
        found = transport.walk(
            held, visit, combine, [_gradient(rows, 0)], symmetric=square, own_last=True, at_once=not both
        )
        if rows_need_grad and grad_rows is None:
            grad_rows = _gradient(rows)
        grads = [grad_rows, None]
        if square and rows_need_grad:
            grads[0] = grad_rows.add_(found[0])
        elif columns_need_grad:
            grads[1] = found[0]
        grads = [None if grad is None else grad.to(rows.dtype) for grad in grads]
        return *grads, grad_scale if ctx.needs_input_grad[2] else None, *[None] * 6


def _marks(positives, row_ids, column_ids, block, part, square, first):
    """(positives, row_ids, column_ids) for a visit; positives lie in the own block."""
    positives = positives if first else None
    if square and first:
        return positives, row_ids, None
    if column_ids is None:
        return positives, None, None
    return positives, row_ids[part], block[1]


@breaking_the_graph
def log_sums(
    rows, columns, scale, setting, sizes, *, positives=None, row_ids=None, column_ids=None, both=False
):
    """`contrastive` of this rank's rows against the columns of all ranks, or of the rows of all among themselves.

    Args:
        rows: (n, D) of this rank.
        columns: (m, D) of this rank, or None: the rows.
        scale: 0-d tensor.
        setting: `Setting`.
        sizes: How many columns (square: rows) each rank has.
        positives: (n,) or (n, P) indices into this rank's own columns.
        row_ids, column_ids: As in `contrastive`. Without columns, row_ids are compared within the rank, and with other
            ranks' column_ids if these are given.
        both: Also the log-sum-exp over the rows of all ranks for each of this rank's columns.

    Returns:
        (lse (n,), column_lse (m,) or (0,), positive_logits), float64.
    """
    operands = distinct(rows, columns, scale, positives, row_ids, column_ids)
    return _LogSums.apply(*operands, both, sizes, setting)


class _LogSumOfLogits(torch.autograd.Function):
    """A log-sum-exp that was made elsewhere, with its gradient: the expectation of the columns."""

    @staticmethod
    def forward(ctx, scaled_rows, lse, expectation):
        ctx.save_for_backward(expectation)
        return lse.clone()

    @staticmethod
    @once
    def backward(ctx, grad):
        (expectation,) = ctx.saved_tensors
        return (grad[:, None] * expectation).to(expectation.dtype), None, None


def log_sums_with_expectation(scaled_rows, lse, expectation):
    """lse as a function of scale · unit rows, of which it has `expectation` as its gradient."""
    return _LogSumOfLogits.apply(scaled_rows, lse, expectation)


@breaking_the_graph
@torch.no_grad()
def frozen_columns(rows, columns, scale, setting, sizes, normalize_columns, ids=None):
    """[lse (n,), expectation (n, D)] of this rank's rows over the columns of all ranks, which get no gradient.

    ids: (n,) of the rows and of this rank's columns, or None: pairs of equal ids but row i and own column i stay out.
    """
    transport = setting.transport(sizes)
    x = widened(rows)
    found = LogSum.nothing([x.new_empty(0, dtype=torch.float64), _gradient(x[:0])], x.shape[0])

    def visit(block, part, first):
        if x.shape[0] and block[0].shape[0]:
            options = {"ids": None if ids is None else (ids, block[1]), "own": first and ids is not None}
            LogSum.merge(found, _frozen(x, widened(block[0]), scale, setting, normalize_columns, **options))

    transport.walk(transport.collect(columns, *([] if ids is None else [ids])), visit)
    return found


@breaking_the_graph
@torch.no_grad()
def travelling_rows(rows, columns, scale, setting, sizes, row_ids=None, column_ids=None):
    """The same where each rank keeps its columns, and the rows of all ranks come by; sizes are those of rows.

    row_ids, column_ids: As in `contrastive`.
    """
    transport = setting.transport(sizes)
    like = [rows.new_empty(0, dtype=torch.float64), _gradient(rows[:0])]

    def visit(block, part, first):
        x = widened(block[0])
        if not x.shape[0] or not columns.shape[0]:
            return LogSum.nothing(like, x.shape[0])
        ids = None if row_ids is None else (block[1], column_ids)
        return _frozen(x, columns, scale, setting, False, ids)

    return transport.walk(
        transport.collect(rows, *([] if row_ids is None else [row_ids])), visit, LogSum, like
    )


def _frozen(rows, columns, scale, setting, normalize_columns, ids=None, own=False):
    normalize = (setting.normalize, normalize_columns)
    return operators.frozen_fwd(setting.backend, rows, columns, scale, normalize, ids, own=own)


class _SigmoidSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, columns, scale, bias, ids, column_of_row, sizes, setting):
        transport = setting.transport(sizes)
        held = transport.collect(columns, *([] if ids is None else [ids]))
        x = widened(rows)
        losses = x.new_zeros(x.shape[0], dtype=torch.float64)

        def visit(block, part, first):
            nonlocal losses
            y = widened(block[0])
            if x.shape[0] and y.shape[0]:
                marks = _sigmoid_marks(block, first, ids, column_of_row)
                losses = losses + operators.sigmoid_pairs_fwd(
                    setting.backend, x, y, scale, bias, *marks, setting.normalize
                )

        transport.walk(held, visit)
        ctx.save_for_backward(rows, scale, bias, ids, column_of_row, *held)
        ctx.options = sizes, setting
        return losses

    @staticmethod
    @once
    def backward(ctx, grad_losses):
        rows, scale, bias, ids, column_of_row, *held = ctx.saved_tensors
        sizes, setting = ctx.options
        transport = setting.transport(sizes)
        x = widened(rows)
        needs = ctx.needs_input_grad[:2]
        grad_rows, grad_scale, grad_bias = None, torch.zeros_like(scale), torch.zeros_like(bias)

        def visit(block, part, first):
            nonlocal grad_rows, grad_scale, grad_bias
            y = widened(block[0])
            if not x.shape[0] or not y.shape[0]:
                return [_gradient(y)] if needs[1] else None
            marks = _sigmoid_marks(block, first, ids, column_of_row)
            part_rows, part_columns, part_scale, part_bias = operators.sigmoid_pairs_bwd(
                setting.backend, grad_losses, x, y, scale, bias, *marks, setting.normalize, needs
            )
            grad_scale, grad_bias = grad_scale + part_scale, grad_bias + part_bias
            if needs[0]:
                grad_rows = _added(grad_rows, part, part_rows, rows)
            return [part_columns.to(accumulation_dtype(rows))] if needs[1] else None

        found = transport.walk(held, visit, Sum if needs[1] else None, [_gradient(rows, 0)], own_last=True)
        if needs[0] and grad_rows is None:
            grad_rows = _gradient(rows)
        return (
            grad_rows.to(rows.dtype) if needs[0] else None,
            found[0].to(rows.dtype) if needs[1] else None,
            grad_scale if ctx.needs_input_grad[2] else None,
            grad_bias if ctx.needs_input_grad[3] else None,
            *[None] * 4,
        )


def _sigmoid_marks(block, first, ids, column_of_row):
    """(diagonal, ids) of a block as the operators take them. Positive pairs lie in the own one alone."""
    columns = block[0]
    if first and column_of_row is not None:
        return 0, (column_of_row, torch.arange(columns.shape[0], device=columns.device), True)
    return 0 if first else columns.shape[0], () if ids is None else (ids, block[1])


@breaking_the_graph
def sigmoid_sums(rows, columns, scale, bias, setting, sizes, *, ids=None, column_of_row=None):
    """`sigmoid_pairs` of this rank's rows and the columns of all, (n,) float64; pair i is row i and own column i.

    Args:
        sizes: How many columns each rank has.
        ids: (n,) of this rank's pairs, or None: other pairs of equal ids are left out.
        column_of_row: (n,) the own column that each row is a pair with, in place of i. Not with ids.
    """
    operands = distinct(rows, columns, scale, bias, ids, column_of_row)
    return _SigmoidSums.apply(*operands, sizes, setting)
