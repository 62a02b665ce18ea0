"""Losses lse_i − s_i,p(i): of each row's softmax over its columns, with one of these as its positive p(i)."""

import torch

from ssl_kernels import backends
from ssl_kernels.checks import values_are_readable
from ssl_kernels.losses._shared import (
    as_scalar,
    native_row_losses,
    not_below_zero,
    reduce,
    runs_natively,
    stacked,
    takes_row_losses,
)
from ssl_kernels.ops.contrastive import contrastive


def views_loss(
    z0, z1, scale, reduction, row_weights, *, leaves_partner_out=False, normalize, backend, caller
):
    """Reduced losses of the rows of z0 above z1, each among the others: p(i) is the other view of i.

    Args:
        z0, z1: (B, D) each, or z1 None and z0 (2B, D) both views.
        scale: A number, or a tensor as `contrastive` takes it.
        leaves_partner_out: Whether p(i) is left out of the sum.
        caller: The loss, named in errors.
    """
    is_total = row_weights is None and reduction != "none"
    if is_total and runs_natively(backend, caller, z0, views=1 if z1 is None else 2):
        flags = {"are_views": True, "leaves_partner_out": leaves_partner_out, "normalize": normalize}
        return one_node(z0, z1, scale, reduction=reduction, **flags)[0]
    views = z0 if z1 is None else stacked(z0, z1)
    lse, positive = sums_of_views(
        views,
        as_scalar(scale, z0),
        samples(views) if leaves_partner_out else None,
        normalize=normalize,
        backend=backend,
        caller=caller,
    )
    return reduce(lse - positive, reduction, views, row_weights)


def samples(views):
    """(2B,) the number of each view's sample."""
    return torch.arange(views.shape[0] // 2, device=views.device).repeat(2)


def sums_of_views(views, scale, ids=None, *, normalize, backend, caller):
    """log Σ exp over all other views, of other ids if given, and the logit of the partner; (2B,) float64 each."""
    half = views.shape[0] // 2
    partner = torch.arange(-half, half, device=views.device)  # negative indices count from the end
    lse, _, positive = contrastive(
        views,
        None,
        scale,
        positives=partner,
        row_ids=ids,
        normalize_rows=normalize,
        backend=backend,
        caller=caller,
    )
    return lse, positive


def pairs_loss(
    rows,
    columns,
    scale,
    reduction,
    row_weights,
    *,
    row_ids=None,
    column_ids=None,
    column_bias=None,
    both_directions=False,
    normalize,
    backend,
    caller,
):
    """Reduced losses of rows over columns with p(i) = i; with both_directions the mean of both softmaxes.

    Args:
        columns: As many as rows, or more without both_directions: those of no row come last.
        scale: A number, or a tensor as `contrastive` takes it.
        row_ids, column_ids: (N,) and (M,) int64, or None: other pairs of equal ids stay out of the sums.
        column_bias: As in `contrastive`; that of p(i) counts in its logit too. Not with both_directions.
        caller: The loss, named in errors.
    """
    is_total = row_weights is None and reduction != "none"
    has_bias = column_bias is not None
    if (
        is_total
        and runs_natively(backend, caller, rows, columns, both_directions, has_bias)
        and not (has_bias and not values_are_readable(rows, columns, column_bias))
    ):
        return one_node(
            rows,
            columns,
            scale,
            row_ids=row_ids,
            column_ids=column_ids,
            column_bias=column_bias,
            both_directions=both_directions,
            normalize=normalize,
            reduction=reduction,
        )[0]
    added = {"column_bias": column_bias} if has_bias else {}
    lse, column_lse, positive = contrastive(
        rows,
        columns,
        as_scalar(scale, rows),
        positives=torch.arange(rows.shape[0], device=rows.device),
        row_ids=row_ids,
        column_ids=column_ids,
        normalize_rows=normalize,
        normalize_columns=normalize,
        keep_diagonal=True,
        both_directions=both_directions,
        equal_weights=is_total,
        backend=backend,
        caller=caller,
        **added,
    )
    if both_directions:
        return reduce((lse + column_lse) / 2 - positive, reduction, rows, row_weights)
    terms = (lse, positive, column_bias[: rows.shape[0]]) if has_bias else (lse, positive)
    if takes_row_losses(backend, caller, rows, *terms):
        return native_row_losses("softmax", terms, reduction, rows, row_weights)
    loss = not_below_zero(lse - (positive + terms[2].double())) if has_bias else lse - positive
    return reduce(loss, reduction, rows, row_weights)


def is_one_node(backend, caller, reduction, row_weights, rows, *values, views=1):
    """Whether `one_node` gives the reduced loss of rows: by tensors among `values` that can be read."""
    if row_weights is not None or reduction == "none":
        return False
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    return values_are_readable(rows, *tensors) and runs_natively(backend, caller, rows, views=views)


def one_node(
    rows,
    others,
    scale,
    *,
    classes=None,
    row_ids=None,
    column_ids=None,
    positives=None,
    numbers=None,
    column_bias=None,
    positive_prior=None,
    are_views=False,
    leaves_partner_out=False,
    both_directions=False,
    joint=False,
    classes_apart=False,
    normalize,
    normalize_others=None,
    reduction,
    divisor=None,
):
    """(reduced loss, how many losses the mean is over) in C++: csrc/ops/contrastive_loss.cpp has what, and says why.

    Where `runs_natively`, `reduction` is "mean" or "sum"; with classes, positives, numbers of rows, a bias, a prior or
    joint sums also where `is_one_node`. `normalize_others` is as `normalize` where it is None. A number
    `divisor` makes the loss the sum of all over it, whatever `reduction` says.
    """
    learned, constant = (scale, 1.0) if isinstance(scale, torch.Tensor) else (None, scale)
    is_plain = values_are_readable(
        rows, rows if others is None else others, rows if learned is None else learned
    )
    run = backends.extension.contrastive_loss if is_plain else torch.ops.ssl_kernels.contrastive_loss.native
    return run(
        rows,
        others,
        learned,
        constant,
        classes,
        row_ids,
        column_ids,
        positives,
        numbers,
        column_bias,
        positive_prior,
        are_views,
        leaves_partner_out,
        both_directions,
        joint,
        classes_apart,
        normalize,
        normalize if normalize_others is None else normalize_others,
        (0.0 if reduction == "mean" else 1.0) if divisor is None else divisor,
    )
