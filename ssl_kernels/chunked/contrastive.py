"""`contrastive` in plain PyTorch, a block of rows at a time. docs/contrastive.md is the contract.

Logits of a block are (block, M) in float32 (float64 for float64 input); nothing larger is made.
"""

import torch

from ssl_kernels.arguments import ContrastiveBackward, ContrastiveForward
from ssl_kernels.chunked.rows import LOGITS_PER_BLOCK, input_gradient, unit_rows, without_autocast
from ssl_kernels.constants import holds_expectation
from ssl_kernels.reference.contrastive import infinite_as_nan


class Blocks:
    """The logits of one call, a block of rows at a time.

    Args:
        call: `ContrastiveForward` or `ContrastiveBackward`.
        positives: Those of the call, or None where they are not looked up and no limit has to know them.
    """

    def __init__(self, call, positives=None):
        self.call, self.square = call, call.columns is None
        self.row_bias = call.column_bias if self.square else call.row_bias
        # Whether logits differ between the sums of rows and of columns, which in the square case are those of rows
        # again.
        self.two_sided = call.column_bias is not None or self.row_bias is not None
        if self.square:
            self.two_sided = self.two_sided or call.row_limit is not None
        self.rows, self.row_rnorm = unit_rows(call.rows, call.normalize_rows)
        if self.square:
            self.columns, self.column_rnorm, self.column_ids = self.rows, self.rows.new_empty(0), call.row_ids
        else:
            self.columns, self.column_rnorm = unit_rows(call.columns, call.normalize_columns)
            self.column_ids = call.column_ids
        self.positives = self.positive_logits = None
        if positives is not None:
            from_the_end = positives < 0
            self.positives = (positives + from_the_end * len(self.columns)).view(len(self.rows), -1)
            self.positive_logits = self.rows.new_empty(self.positives.shape)

    def __iter__(self):
        """Yields (slice of rows, their logits in the sums of rows, in those of columns): -inf where left out."""
        n, m = len(self.rows), len(self.columns)
        size = max(1, LOGITS_PER_BLOCK // m)
        for start in range(0, n, size):
            block = slice(start, min(start + size, n))
            logits = self.call.scale * (self.rows[block] @ self.columns.T)  # (block, M)
            if self.positives is not None:  # the numbers that enter the sums, which are no less than these
                self.positive_logits[block] = logits.gather(1, self.positives[block])
            by_columns = logits.clone() if self.two_sided else logits
            for side in (logits, by_columns) if self.two_sided else (logits,):
                turned = self.square and side is not logits
                if self.call.row_limit is not None:
                    self._limit(side, block, turned)
                self._leave_out(side, block)
            if self.two_sided:
                if self.call.column_bias is not None:
                    _add_bias(logits, self.call.column_bias)
                if self.row_bias is not None:
                    _add_bias(by_columns, self.row_bias[block, None])
            yield block, logits, by_columns

    def _leave_out(self, logits, block):
        diagonal = logits.diagonal(offset=block.start)
        if self.call.row_ids is not None:
            kept = diagonal.clone() if self.call.keep_diagonal and not self.square else None
            equal = self.call.row_ids[block, None] == self.column_ids[None, :]
            logits.masked_fill_(~equal if self.call.only_equal_ids else equal, -torch.inf)
            if kept is not None:
                diagonal.copy_(kept)
        if self.square:
            diagonal.fill_(-torch.inf)

    def _limit(self, logits, block, turned):
        """Leaves out what is above its row's limit; `turned`: entry (i, j) stands for (j, i)."""
        above = logits > (self.call.row_limit if turned else self.call.row_limit[block, None])
        if self.call.exempt is not None:
            above &= ~(self.call.exempt[block, None] if turned else self.call.exempt)
        if self.positives is not None:
            if turned:  # columns whose positives are among these rows
                columns = torch.arange(len(self.columns), device=logits.device)[:, None]
                inside = (self.positives >= block.start) & (self.positives < block.stop)
                rows = (self.positives - block.start).where(inside, 0)
                # A place outside writes what is there already.
                columns = columns.expand_as(rows)
                keep = torch.zeros_like(above)
                keep.index_put_((rows, columns), inside, accumulate=True)
                above &= ~keep
            else:
                above.scatter_(1, self.positives[block], False)
        logits.masked_fill_(above, -torch.inf)


def _add_bias(logits, bias):
    """Adds to what was not left out, whatever the bias is."""
    left_out = logits == -torch.inf
    logits.add_(bias).masked_fill_(left_out, -torch.inf)


def finite_max(logits, dim):
    """The maximum as a shift: 0 where it is infinite, so that exp(-inf - shift) is 0 and exp(inf - shift) infinite."""
    top = logits.amax(dim)
    return top.masked_fill(top.isinf(), 0)


@without_autocast
def contrastive_fwd(*args):
    call = ContrastiveForward(*args)
    positives, both_directions = call.positives, call.both_directions
    blocks = Blocks(call, positives)
    n, m = len(blocks.rows), len(blocks.columns)
    wide = {"dtype": torch.float64, "device": call.rows.device}
    lse = torch.empty(n, **wide)
    column_lse = torch.full((m if both_directions else 0,), -torch.inf, **wide)
    kept = blocks.rows.new_empty(blocks.rows.shape if call.wants_expectation else 0)
    for block, logits, by_columns in blocks:
        shift = finite_max(logits, 1)
        terms = (logits - shift[:, None]).exp_()
        total = terms.sum(1)
        lse[block] = shift.double() + total.double().log()
        if call.wants_expectation:
            kept[block] = terms @ blocks.columns / total.masked_fill(total == 0, 1)[:, None]
        if both_directions:
            shift = finite_max(by_columns, 0)
            here = shift.double() + (by_columns - shift).exp_().sum(0).double().log()
            column_lse = torch.logaddexp(column_lse, here)
    if positives is None:
        positive_logits = torch.empty(0, **wide)
    else:
        positive_logits = blocks.positive_logits.double().view(positives.shape)
    ids = (None, None) if call.only_equal_ids else (call.row_ids, call.column_ids)
    lse, column_lse = infinite_as_nan(lse, column_lse, positives, *ids, call.keep_diagonal)
    return lse, column_lse, positive_logits, blocks.row_rnorm, blocks.column_rnorm, kept


def softmax_weights(grad, lse, dtype):
    """shift, weight with grad · exp(s − lse) = weight · exp(s − shift), the rounding of shift taken into the weight.

    A gradient of 0, which torch.compile passes for none, has weight 0 and an exponential of 0, however large s is.
    """
    counts = (lse != -torch.inf) & (grad != 0)
    lse = lse.where(counts, 0)
    shift = lse.to(dtype)
    weight = (grad * torch.exp(shift.double() - lse)).where(counts, 0).to(dtype)
    return shift.masked_fill(grad == 0, torch.inf), weight


@without_autocast
def contrastive_bwd(*args):
    call = ContrastiveBackward(*args)
    grad_lse, grad_column_lse, grad_positive_logits, rows, columns, scale, positives, *_ = call
    lse, column_lse = call.lse, call.column_lse
    positives_alone = not any(map(_counts, (grad_lse, grad_column_lse)))
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    has_positives = positives is not None and grad_positive_logits is not None
    if holds_expectation(call.kept):
        x = unit_rows(rows, call.normalize_rows)[0]
        counts = (lse != -torch.inf) & (grad_lse != 0)
        grad_x = torch.where(counts[:, None], grad_lse.to(x.dtype)[:, None] * call.kept, 0)
        if has_positives:
            for index, q in _by_positive(positives, grad_positive_logits.to(x.dtype)):
                grad_x += _times(q, unit_rows(columns[index], call.normalize_columns)[0].to(x.dtype))
        grad_scale = (x * grad_x).sum(dtype=torch.float64).to(x.dtype)
        grad_rows = input_gradient(scale * grad_x, x, call.row_rnorm).to(rows.dtype)
        nothing = (x.new_empty(0), x.new_empty(0))
        return (
            grad_rows if call.rows_need_grad else rows.new_empty(0),
            rows.new_empty(0),
            grad_scale,
            *nothing,
        )

    blocks = Blocks(call, None if call.row_limit is None else positives)
    x, y = blocks.rows, blocks.columns
    row_shift, row_weight = softmax_weights(grad_lse, lse, x.dtype)
    if blocks.square:
        column_shift, column_weight = row_shift, row_weight
    elif call.both_directions:
        grad_column_lse = torch.zeros_like(column_lse) if grad_column_lse is None else grad_column_lse
        column_shift, column_weight = softmax_weights(grad_column_lse, column_lse, x.dtype)

    # The gradients by the normalised rows and columns, before `scale`.
    grad_x = torch.empty_like(x)
    grad_y = None if blocks.square else torch.zeros_like(y)
    grad_column_bias = x.new_zeros(len(y) if call.column_bias_needs_grad else 0, dtype=torch.float64)
    grad_row_bias = x.new_zeros(len(x) if call.row_bias_needs_grad else 0, dtype=torch.float64)
    for block, logits, by_columns in blocks:
        if positives_alone:
            coefficients = logits.zero_()
        else:
            coefficients = (logits - row_shift[block, None]).exp_() * row_weight[block, None]
            if call.column_bias_needs_grad:
                grad_column_bias += coefficients.sum(0)
            if blocks.square or call.both_directions:
                of_columns = (by_columns - column_shift).exp_() * column_weight
                if call.row_bias_needs_grad:
                    grad_row_bias[block] = of_columns.sum(1, dtype=torch.float64)
                coefficients += of_columns
        grad_x[block] = coefficients @ y
        if call.columns_need_grad and not blocks.square:
            grad_y += coefficients.T @ x[block]
    if has_positives:
        for index, q in _by_positive(positives, grad_positive_logits.to(x.dtype)):
            grad_x += _times(q, y[index])
            # index_put_ sorts on CUDA where index_add_ would use atomics.
            target = grad_x if blocks.square else grad_y
            target.index_put_((index,), _times(q, x), accumulate=True)

    grad_scale = (x * grad_x).sum(dtype=torch.float64).to(x.dtype)
    if blocks.square:
        grad_scale = grad_scale / 2
    grad_rows = grad_columns = None
    if call.rows_need_grad:
        grad_rows = input_gradient(scale * grad_x, x, call.row_rnorm).to(rows.dtype)
    if call.columns_need_grad and not blocks.square:
        grad_columns = input_gradient(scale * grad_y, y, call.column_rnorm).to(columns.dtype)
    grad_rows, grad_columns = (
        rows.new_empty(0) if grad is None else grad for grad in (grad_rows, grad_columns)
    )
    return grad_rows, grad_columns, grad_scale, grad_column_bias.to(x.dtype), grad_row_bias.to(x.dtype)


def _counts(grad):
    """Whether a gradient may be other than 0, which a device is not waited for to tell."""
    return grad is not None and (not grad.is_cpu or bool(grad.any()))


def _times(q, rows):
    """q_i · row_i, 0 for q_i = 0 even if the row is infinite."""
    return torch.where(q[:, None] != 0, q[:, None] * rows, 0)


def _by_positive(positives, grads):
    """Pairs of (N,) columns of both, one for each positive of a row."""
    n = len(positives)
    return zip(positives.view(n, -1).unbind(1), grads.view(n, -1).unbind(1), strict=True)
