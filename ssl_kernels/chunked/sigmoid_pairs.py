"""`sigmoid_pairs` in plain PyTorch, a block of rows at a time. docs/sigmoid_pairs.md is the contract.

Logits of a block are (block, M) in float32 (float64 for float64 input); nothing larger is made.
"""

import torch

from ssl_kernels.arguments import SigmoidPairsBackward, SigmoidPairsForward
from ssl_kernels.chunked.rows import LOGITS_PER_BLOCK, input_gradient, unit_rows, without_autocast


def _blocks(x, y, scale, bias, diagonal, ids):
    """Yields (slice of rows, their logits, `_negate`'s positive pairs); logits that count nothing are -inf.

    ids: (row_ids, column_ids, equal_ids_are_positive), or None.
    """
    n, m = len(x), len(y)
    size = max(1, LOGITS_PER_BLOCK // m)
    for start in range(0, n, size):
        block = slice(start, min(start + size, n))
        logits = (scale * (x[block] @ y.T)).add_(bias)  # (block, M)
        offset = start + diagonal
        inside = -len(logits) < offset < m
        positive = logits.diagonal(offset=offset) if inside else logits.new_empty(0)
        if ids is not None:
            row_ids, column_ids, equal_ids_are_positive = ids
            equal = row_ids[block, None] == column_ids
            if equal_ids_are_positive:
                positive = equal
            else:
                stay = positive.clone()
                logits.masked_fill_(equal, -torch.inf)
                positive.copy_(stay)
        yield block, logits, positive


def _negate(values, positive):
    """Negates those of positive pairs in place: `positive` is a mask, or a view of them."""
    if positive.dtype == torch.bool:
        torch.where(positive, -values, values, out=values)
    else:
        positive.neg_()


def _softplus(z):
    """log(1 + exp(z)) to full relative precision, the small values too."""
    return z.clamp_min(0) + torch.exp(-z.abs()).log1p()


def _gradients(x, y, scale, bias, diagonal, ids, weight, columns_need_grad):
    """Gradients of the weighted losses by the rows and columns used, before `scale`, and by bias; and the losses."""
    grad_x = torch.empty_like(x)
    grad_y = torch.zeros_like(y) if columns_need_grad else None
    losses = torch.empty(len(x), dtype=torch.float64, device=x.device)
    grad_bias = torch.zeros((), dtype=torch.float64, device=x.device)
    for block, logits, positive in _blocks(x, y, scale, bias, diagonal, ids):
        _negate(logits, positive)
        losses[block] = _softplus(logits).sum(1, dtype=torch.float64)
        coefficients = logits.sigmoid_()
        _negate(coefficients, positive)  # −σ(−z)
        if weight is not None:
            coefficients *= weight[block, None]
        grad_bias += coefficients.sum(dtype=torch.float64)
        grad_x[block] = coefficients @ y
        if columns_need_grad:
            grad_y += coefficients.T @ x[block]
    return losses, grad_x, grad_y, grad_bias


def _finish(call, grad_x, grad_y, grad_bias, x, y, rnorms, dtype):
    """The operator's four gradients, those by rows and columns in `dtype`."""
    grad_scale = (x * grad_x).sum(dtype=torch.float64).to(x.dtype)
    grad_rows, grad_columns = (
        input_gradient(call.scale * grad, unit, rnorm).to(dtype) if need else x.new_empty(0, dtype=dtype)
        for grad, unit, rnorm, need in zip(
            (grad_x, grad_y), (x, y), rnorms, (call.rows_need_grad, call.columns_need_grad), strict=True
        )
    )
    return grad_rows, grad_columns, grad_scale, grad_bias.to(x.dtype)


def _operands(call):
    """What `_blocks` takes, and the reciprocal norms of rows and columns."""
    x, x_rnorm = unit_rows(call.rows, call.normalize_rows)
    y, y_rnorm = unit_rows(call.columns, call.normalize_columns)
    ids = None if call.row_ids is None else (call.row_ids, call.column_ids, call.equal_ids_are_positive)
    return (x, y, call.scale, call.bias, call.diagonal, ids), (x_rnorm, y_rnorm)


@without_autocast
def sigmoid_pairs_fwd(*args):
    call = SigmoidPairsForward(*args)
    operands, rnorms = _operands(call)
    x = operands[0]
    if call.total and call.keep:
        losses, *grads = _gradients(*operands, None, call.columns_need_grad)
        return losses.sum(), *_finish(call, *grads, *operands[:2], rnorms, x.dtype)
    losses = torch.empty(len(x), dtype=torch.float64, device=x.device)
    for block, logits, positive in _blocks(*operands):
        _negate(logits, positive)
        losses[block] = _softplus(logits).sum(1, dtype=torch.float64)
    return losses.sum() if call.total else losses, *(x.new_empty(0) for _ in range(4))


@without_autocast
def sigmoid_pairs_bwd(*args):
    call = SigmoidPairsBackward(*args)
    operands, rnorms = _operands(call)
    weight = call.grad_losses.to(operands[0].dtype)
    _, *grads = _gradients(*operands, weight, call.columns_need_grad)
    return _finish(call, *grads, *operands[:2], rnorms, call.rows.dtype)
