"""pytorch-metric-learning's pair and triplet losses and wrappers (2.9). Losses come back as float32 or float64.

The classes are the library's own, whose sums over pairs are streamed: its reducers, regularisers, records and wrappers
work with them. The functions here are what they compute, and need no such library.
"""

import torch
import torch.nn.functional as F

from ssl_kernels.adapters._classes import class_mates, has_mate
from ssl_kernels.adapters._shared import classes_of, scale_of
from ssl_kernels.checks import values_are_readable
from ssl_kernels.losses import sup_con_loss
from ssl_kernels.losses._rows import row_pairs_loss
from ssl_kernels.losses._shared import as_scalar, minus_log_sigmoid, not_below_zero, takes_row_losses
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import accumulation_dtype
from ssl_kernels.ops.row_pairs import row_pairs

_LOSSES = "pytorch_metric_learning.losses"
ORIGINALS = {
    "NTXentLoss": f"{_LOSSES}.ntxent_loss",
    "SupConLoss": f"{_LOSSES}.supcon_loss",
    "TripletMarginLoss": f"{_LOSSES}.triplet_margin_loss",
    "SelfSupervisedLoss": f"{_LOSSES}.self_supervised_loss",
    "CrossBatchMemory": f"{_LOSSES}.cross_batch_memory",
}
HOME = _LOSSES  # where `patch` looks for losses without an adapter
__all__ = sorted(ORIGINALS)
_OWN = "runs the library's own code, with a warning"
DIFFERENCES = {
    "NTXentLoss": "does not saturate at 87.34 (float16: 9.70) with gradient 0, give 0 for a single pair, nor lose pairs"
    " whose loss underflows from the mean of an AvgNonZeroReducer (`strict=True` does);"
    f" indices_tuple, or a distance other than cosine and dot product, {_OWN}",
    "SupConLoss": "rows whose loss underflows stay in the mean, and rows of one label alone have a loss, not 0"
    f" (`strict=True`: as the library); the rest as NTXentLoss {_OWN}",
    "TripletMarginLoss": f"given triplets (a miner's) are gathered; all triplets, swap and other distances: {_OWN}",
    "SelfSupervisedLoss": "as the loss inside",
    "CrossBatchMemory": "the row of a batch of one is not its own positive; an enqueue_mask without a True does not"
    " count the memory as full",
}


def nt_xent_of_pairs(rows, labels, columns, column_labels, temperature, own=None, normalize=True):
    """−log(e^{s_p} / (e^{s_p} + Σ_n e^{s_n})) of each pair of an anchor and a positive p; n are the anchor's negatives.

    Args:
        rows: (N, D), anchors.
        labels: (N,).
        columns: (M, D), or None: rows themselves.
        column_labels: (M,).
        own: (N,) index of the column that is no positive of its row, or None.

    Returns:
        (losses, anchors, positives): (pairs,) each.
    """
    mates, is_mate = class_mates(labels, column_labels)
    if own is not None:
        is_mate = is_mate & (mates != own[:, None])
    lse, _, logits = contrastive(
        rows,
        columns,
        scale_of("NTXentLoss", temperature, rows, positive=False),
        positives=mates,
        row_ids=labels,
        column_ids=None if columns is None else column_labels,
        normalize_rows=normalize,
        normalize_columns=normalize,
        caller="NTXentLoss",
    )
    anchors, place = is_mate.nonzero(as_tuple=True)
    losses = minus_log_sigmoid(logits[anchors, place] - lse[anchors])
    return losses.to(accumulation_dtype(rows)), anchors, mates[anchors, place]


def sup_con_of_rows(rows, labels, columns, column_labels, temperature, own=None, normalize=True):
    """SupCon's loss of each row, (N,), against columns, arguments as above; 0 for a row without a positive alone.

    The library's reducer takes the mean of what is > 0. A loss that is so small that rounding leaves nothing of it
    is `finfo.tiny`.
    """
    if columns is None:
        losses = sup_con_loss(rows, labels, temperature, normalize=normalize, reduction="none")
        return _above_zero(losses, has_mate(labels) if len(rows) > 2 else None)
    mates, is_mate = class_mates(labels, column_labels)
    slots = None if own is None else torch.arange(len(columns), device=rows.device)
    if own is not None:
        is_mate = is_mate & (mates != own[:, None])
    lse, _, logits = contrastive(
        rows,
        columns,
        scale_of("SupConLoss", temperature, rows),
        positives=mates,
        row_ids=own,
        column_ids=slots,
        normalize_rows=normalize,
        normalize_columns=normalize,
        caller="SupConLoss",
    )
    count = is_mate.sum(1)
    means = logits.masked_fill(~is_mate, 0).sum(1) / count.clamp_min(1)
    losses = (lse - means).where(count > 0, 0).to(accumulation_dtype(rows))
    return _above_zero(losses, count > 0 if len(columns) > (1 if own is None else 2) else None)


def _above_zero(losses, counts):
    """`losses`, not below 0, and where `counts` above it; the gradients are theirs. None: nowhere."""
    losses = not_below_zero(losses)
    return losses if counts is None else losses + counts.to(losses.dtype) * torch.finfo(losses.dtype).tiny


def _rows_at(rows, index):
    """rows[index]; the gradient of index_select adds up whole rows."""
    return rows.index_select(0, index.where(index >= 0, index + len(rows)))


def triplet_margins(rows, columns, triplets, margin, normalize=True, smooth=False):
    """relu(|a − p| − |a − n| + margin) of triplets of indices, a of rows and p, n of columns; smooth: softplus."""
    anchor, positive, negative = triplets
    readable = values_are_readable(rows, *triplets) and columns is rows and not smooth
    if readable and takes_row_losses(None, "TripletMarginLoss", rows):
        return torch.ops.ssl_kernels.triplet_loss.given(
            rows, *triplets, as_scalar(margin, rows), normalize, "euclidean", "none"
        )
    chosen = (_rows_at(rows, anchor), _rows_at(columns, positive), _rows_at(columns, negative))
    options = {"normalize": normalize, "measure": "distance", "caller": "TripletMarginLoss"}
    if smooth:
        return F.softplus(row_pairs(*chosen, **options) + margin).to(accumulation_dtype(rows))
    return row_pairs_loss(*chosen, rule="hinge", constant=margin, reduction="none", **options)


__getattr__ = classes_of(__name__)
