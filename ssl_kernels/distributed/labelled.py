"""The losses of labelled rows over a process group."""

import torch

from ssl_kernels.checks import check_choice, check_scalar
from ssl_kernels.distributed import pairs
from ssl_kernels.distributed.checks import check_rows
from ssl_kernels.distributed.class_sums import classes_of, other_rows_mean
from ssl_kernels.distributed.hardest import hardest_rows
from ssl_kernels.distributed.marked_mean import marked_mean
from ssl_kernels.distributed.over_ranks import over_ranks
from ssl_kernels.losses import sup_con as _sup_con
from ssl_kernels.losses import triplet as _triplet
from ssl_kernels.losses._labels import as_ids
from ssl_kernels.losses._rows import row_dots
from ssl_kernels.losses._shared import inverse, not_below_zero, unit_rows
from ssl_kernels.ops.batch_hard import DISTANCES


@over_ranks
def sup_con_loss(
    call,
    features,
    labels,
    temperature=0.07,
    *,
    positives=None,
    unlabelled=None,
    normalize=True,
    reduction="mean",
    row_weights=None,
    backend=None,
):
    op = call.op
    with call.checking():
        check_rows(op, features=features)
        columns = None
        if isinstance(positives, torch.Tensor):
            if positives.dim() != 2:
                raise ValueError(
                    f"{op}: positives must have a row for each of this rank's and a column for each of all ranks',"
                    f" got shape {tuple(positives.shape)}"
                )
            columns = positives.shape[1]
        marks = _sup_con.checked_marks(features, labels, positives, unlabelled, columns)
        check_scalar(op, "temperature", temperature, features, positive=True)
        call.check_common(reduction, row_weights, features.shape[0], features)
    several = labels.shape[1] if columns is None and marks.dim() > 1 else None
    call.meet(
        features,
        {"features": features, "temperature": temperature, "row_weights": row_weights},
        backend,
        reduction=reduction,
        normalize=normalize,
        unlabelled=unlabelled,
        **{"labels per row": several, "columns of positives": columns},
    )
    if columns not in (None, call.total):
        raise ValueError(
            f"{op}: positives must have {call.total} columns, the rows of all ranks, got {columns}"
        )
    scale = inverse(temperature, features)
    features = pairs.widened(features)
    setting = call.setting(normalize)
    lse = pairs.log_sums(features, None, scale, setting, call.sizes)[0]
    rows = unit_rows(features, normalize)
    if marks.dim() > 1:
        mean, counts = marked_mean(rows, marks, setting, call.sizes)
    else:
        classes = classes_of(marks, unlabelled, call.sizes, call.ranks)
        mean, counts = other_rows_mean(rows, classes, call.sizes, call.ranks.name), classes.others
    loss = lse - scale * row_dots(rows, mean)
    has_positive = counts > 0
    loss = not_below_zero(loss).where(has_positive, 0)
    return call.reduce(loss, reduction, row_weights=row_weights, counted=has_positive)


@over_ranks
def triplet_loss(
    call,
    embeddings,
    labels,
    margin=0.2,
    *,
    mining="batch_hard",
    distance="euclidean",
    normalize=True,
    reduction="mean",
    backend=None,
):
    op = call.op
    with call.checking():
        check_rows(op, embeddings=embeddings)
        labels = as_ids(op, "labels", labels, (embeddings.shape[0],), embeddings)
        soft = isinstance(margin, str) and margin == _triplet.SOFT
        if not soft:
            _triplet.check_margin(op, margin, embeddings)
        if mining != "batch_hard":
            raise ValueError(
                f'{op}: mining must be "batch_hard" over several ranks (for others gather the rows, and pass them to'
                f" ssl_kernels.{op}), got {mining!r}"
            )
        check_choice(op, "distance", distance, *DISTANCES)
        call.check_common(reduction, None, 0, embeddings)
    call.meet(
        embeddings,
        {"embeddings": embeddings, "margin": margin},
        backend,
        "batch_hard",
        reduction=reduction,
        normalize=normalize,
        distance=distance,
    )
    x = unit_rows(embeddings, normalize)
    setting = call.setting(normalize)
    positive, negative, complete = hardest_rows(x, labels, distance, setting, call.sizes)
    if distance == "cosine":
        gaps = (x * (negative - positive)).sum(1)
    else:
        gaps = _length(x - positive) - _length(x - negative)
    loss = _triplet.hinge(gaps.double(), margin, embeddings).where(complete, 0)
    return call.reduce(loss, reduction, counted=complete)


def _length(x):
    """‖row‖₂, with gradient 0 at 0."""
    squares = x.square().sum(1)
    zero = squares == 0
    return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
