"""`sigmoid_pairs` by its definition, with the N × M matrix of logits in memory and PyTorch's own autograd."""

import torch
import torch.nn.functional as F

from ssl_kernels.reference.products import product


def sigmoid_pairs(
    rows,
    columns,
    scale,
    bias,
    diagonal=0,
    normalize_rows=True,
    normalize_columns=True,
    total=False,
    row_ids=None,
    column_ids=None,
    equal_ids_are_positive=False,
):
    """Sum over each row's pairs of softplus(−y z); docs/sigmoid_pairs.md is the contract.

    Arguments as of `ops.sigmoid_pairs.sigmoid_pairs`.

    Returns:
        Losses, (N,), or 0-d with `total`. Differentiates twice.
    """
    x = F.normalize(rows, dim=1) if normalize_rows else rows
    y = F.normalize(columns, dim=1) if normalize_columns else columns
    logits = scale * product(x, y.T) + bias  # (N, M)
    column_of = torch.arange(logits.shape[1], device=logits.device) - diagonal
    positive = torch.arange(logits.shape[0], device=logits.device)[:, None] == column_of
    if row_ids is not None:
        equal = row_ids[:, None] == column_ids
        if equal_ids_are_positive:
            positive = equal
        else:
            logits = logits.masked_fill(equal & ~positive, -torch.inf)
    losses = -F.logsigmoid(torch.where(positive, logits, -logits)).sum(1)  # F.softplus overflows or cuts off
    return losses.sum() if total else losses
