"""The operators that a visit of a block calls, each in one place: what changes in their schemas changes here."""

import torch

from ssl_kernels.constants import NORM_EPS, holds_expectation
from ssl_kernels.losses._shared import unit_rows
from ssl_kernels.ops import contrastive as _contrastive
from ssl_kernels.ops import sigmoid_pairs as _sigmoid_pairs
from ssl_kernels.ops.library import accumulation_dtype


def contrastive_fwd(backend, rows, columns, scale, marks, normalize, *, both=False, keep=None, own=False):
    """(lse, column_lse, positive_logits, row_rnorm, column_rnorm, kept) of rows against columns, or among themselves.

    Args:
        marks: (positives, row_ids, column_ids).
        normalize: (of rows, of columns).
        keep: None, or whether a backward that follows will be asked for the gradient of columns. What it is spared
            lies in `kept`, which goes back with the norms.
        own: Row i and column i are a pair, which stays in the sums although its ids are equal.
    """
    flags = (*normalize, own and columns is not None, both)
    return _contrastive._fwd[backend](rows, columns, scale, *marks, *flags, keep is not None, bool(keep))


def contrastive_bwd(
    backend, grads, rows, columns, scale, marks, sums, kept, normalize, needs, *, both=False, own=False
):
    """(grad_rows, grad_columns, grad_scale), given the log-sum-exps over all blocks and their gradients.

    Args:
        grads: (of lse, of column_lse, of positive_logits), None for 0.
        sums: (lse, column_lse).
        kept: (row_rnorm, column_rnorm, kept) of the forward, or None: everything is made again.
        needs: Whether the gradient of (rows, columns) is wanted.
        marks, normalize, own: As in `contrastive_fwd`.
    """
    flags = (*normalize, own and columns is not None, both)
    if kept is None:
        of_columns = rows[:0] if columns is None else columns
        norms = reciprocal_norms(rows, normalize[0]), reciprocal_norms(of_columns, normalize[1])
        kept = (*norms, norms[0].new_empty(0))
    results = _contrastive._bwd[backend](*grads, rows, columns, scale, *marks, *sums, *kept, *flags, *needs)
    return results[:3]  # there are no biases


def frozen_fwd(backend, rows, columns, scale, normalize, ids=None, *, own=False):
    """[lse, expectation of the columns], the gradient of lse by scaled unit rows, of columns that need no gradient.

    ids: (of rows, of columns), or None.
    """
    marks = (None, *(ids or (None, None)))
    lse, *_, kept = contrastive_fwd(backend, rows, columns, scale, marks, normalize, keep=False, own=own)
    if holds_expectation(kept):
        return [lse, kept]
    # A kernel that keeps none, of wide rows: by the backward operator, of rows that are unit and scaled already.
    unit, one = unit_rows(rows, normalize[0]), torch.ones_like(scale)
    scaled = (unit * scale).to(rows.dtype)
    grads, sums = (torch.ones_like(lse), None, None), (lse, lse.new_empty(0))
    flags, needs = (False, normalize[1]), (True, False)
    made = contrastive_bwd(backend, grads, scaled, columns, one, marks, sums, None, flags, needs, own=own)[0]
    return [lse, made.to(unit.dtype)]


def sigmoid_pairs_fwd(backend, rows, columns, scale, bias, diagonal, ids, normalize):
    """Losses of the rows, float64. ids: (of rows, of columns), or nothing."""
    options = (diagonal, normalize, normalize, False, False, False, False)
    return _sigmoid_pairs._fwd[backend](rows, columns, scale, bias, *options, *ids)[0]


def sigmoid_pairs_bwd(backend, grad_losses, rows, columns, scale, bias, diagonal, ids, normalize, needs):
    """(grad_rows, grad_columns, grad_scale, grad_bias)."""
    operands = (rows, columns, scale, bias)
    return _sigmoid_pairs._bwd[backend](grad_losses, *operands, diagonal, normalize, normalize, *needs, *ids)


def reciprocal_norms(rows, normalize):
    """1 / max(‖row‖, eps) as `contrastive_bwd` takes it: (0,) where nothing is normalised."""
    acc = accumulation_dtype(rows)
    if not normalize:
        return rows.new_empty(0, dtype=acc)
    return torch.linalg.vector_norm(rows, dim=1, dtype=acc).clamp_min(NORM_EPS).reciprocal()
