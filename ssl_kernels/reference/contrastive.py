"""`contrastive` by its definition, with the N × M matrix of logits in memory and PyTorch's own autograd."""

import torch
import torch.nn.functional as F

from ssl_kernels.reference.products import product


def contrastive(
    rows,
    columns,
    scale,
    positives=None,
    row_ids=None,
    column_ids=None,
    normalize_rows=True,
    normalize_columns=True,
    keep_diagonal=False,
    both_directions=False,
    column_bias=None,
    row_bias=None,
    row_limit=None,
    exempt=None,
    only_equal_ids=False,
):
    """Log-sum-exp of each row's allowed logits, and the logits at `positives`; docs/contrastive.md is the contract.

    Arguments as of `ops.contrastive.contrastive`, columns in the dtype of rows.

    Returns:
        lse (N,), column_lse (M,) or (0,), positive_logits like positives or (0,). Any of them differentiates twice.
    """
    square = columns is None
    row_vectors = F.normalize(rows, dim=1) if normalize_rows else rows
    if square:
        column_vectors, column_ids = row_vectors, row_ids
    else:
        column_vectors = F.normalize(columns, dim=1) if normalize_columns else columns
    logits = scale * product(row_vectors, column_vectors.T)  # (N, M)

    excluded = torch.zeros_like(logits, dtype=torch.bool)
    if row_ids is not None:
        excluded |= (row_ids[:, None] == column_ids[None, :]) != only_equal_ids
    diagonal = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    if square:
        excluded |= diagonal
    elif keep_diagonal:
        excluded &= ~diagonal
    if positives is None:
        positive_logits = logits.new_empty(0)
    else:
        from_the_end = positives < 0
        columns_of = (positives + from_the_end * logits.shape[1]).view(logits.shape[0], -1)
        positive_logits = logits.gather(1, columns_of).view(positives.shape)
    if row_limit is not None:
        above = logits.detach() > row_limit.detach()[:, None]
        if exempt is not None:
            above = above & ~exempt
        if positives is not None:
            above = above.scatter(1, columns_of, False)
        excluded = excluded | above

    # Filled twice: neither an infinite bias nor one that is NaN reaches what is left out.
    biased = logits if column_bias is None else logits.masked_fill(excluded, 0) + column_bias
    lse = logsumexp(biased.masked_fill(excluded, -torch.inf), 1)
    if both_directions:
        biased = logits if row_bias is None else logits.masked_fill(excluded, 0) + row_bias[:, None]
        column_lse = logsumexp(biased.masked_fill(excluded, -torch.inf), 0)
    else:
        column_lse = logits.new_empty(0)
    if only_equal_ids:  # the rule below is about ids that are equal
        row_ids = column_ids = None
    lse, column_lse = infinite_as_nan(lse, column_lse, positives, row_ids, column_ids, keep_diagonal)
    return lse, column_lse, positive_logits


def logsumexp(logits, dim):
    """torch.logsumexp, with a gradient of 0 where nothing is allowed, also by a bias of -inf."""
    empty = (logits == -torch.inf).all(dim, keepdim=True)
    return torch.logsumexp(logits.masked_fill(empty, 0), dim).masked_fill(empty.squeeze(dim), -torch.inf)


def infinite_as_nan(lse, column_lse, positives, row_ids, column_ids, keep_diagonal):
    """NaN for an lse of +inf, as the softmax over an infinite logit is; but for rows none of whose positives enters."""
    infinite = lse == torch.inf
    if positives is not None and row_ids is not None:
        index = positives.remainder((row_ids if column_ids is None else column_ids).shape[0]).view(
            lse.shape[0], -1
        )
        outside = row_ids[:, None] == (row_ids if column_ids is None else column_ids)[index]
        if keep_diagonal:
            outside &= index != torch.arange(lse.shape[0], device=lse.device)[:, None]
        infinite &= ~outside.all(1)
    # Added, so that gradients are not finite either.
    added, column_added = (
        torch.zeros_like(each).masked_fill(where, torch.nan)
        for each, where in ((lse, infinite), (column_lse, column_lse == torch.inf))
    )
    return lse + added, column_lse + column_added
