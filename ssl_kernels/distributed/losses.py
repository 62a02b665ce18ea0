"""The losses of pairs of rows over a process group. docs/distributed.md has the contract that all of them keep."""

import torch

from ssl_kernels.checks import check_fraction, check_scalar
from ssl_kernels.distributed import groups, pairs
from ssl_kernels.distributed.checks import check_all_rows, check_rows
from ssl_kernels.distributed.over_ranks import over_ranks
from ssl_kernels.distributed.positive_logits import positive_logits
from ssl_kernels.losses import info_nce as _info_nce
from ssl_kernels.losses._labels import as_ids, checked_duplicates
from ssl_kernels.losses._rows import paired_logits, row_dots
from ssl_kernels.losses._shared import (
    as_scalar,
    checked_rows,
    infinite_as_nan,
    inverse,
    logarithm,
    minus_log_sigmoid,
    not_below_zero,
    number_operand,
    stacked,
    unit_rows,
    widest_under_autocast,
)


def _two_views(call, z0, z1, temperature, reduction, row_weights, backend, **options):
    """Checked rows of both views one above the other, and the scale."""
    with call.checking():
        z0, z1 = checked_rows(call.op, 2, check_all_rows, z0=z0, z1=z1)
        check_scalar(call.op, "temperature", temperature, z0, positive=True)
        call.check_common(reduction, row_weights, 2 * z0.shape[0], z0)
    tensors = {"z0": z0, "z1": z1, "temperature": temperature, "row_weights": row_weights}
    call.meet(z0, tensors, backend, reduction=reduction, **options)
    return stacked(z0, z1), inverse(temperature, z0)


def _sums_and_positive(call, views, scale, normalize, **ids):
    """Log Σ exp over all other views, and the logit of each one's other view."""
    n = views.shape[0]
    ids["positives"] = torch.arange(n, device=views.device).roll(n // 2)
    lse, _, positive = pairs.log_sums(views, None, scale, call.setting(normalize), call.rows_of(2), **ids)
    return lse, positive


@over_ranks
def nt_xent_loss(
    call,
    z0,
    z1,
    temperature=0.5,
    *,
    ids=None,
    normalize=True,
    reduction="mean",
    row_weights=None,
    backend=None,
):
    options = {"normalize": normalize, "ids": ids is not None}
    with call.checking():
        if ids is not None and isinstance(z0, torch.Tensor):
            ids = as_ids(call.op, "ids", ids, z0.shape[:1], z0).repeat(2)
    views, scale = _two_views(call, z0, z1, temperature, reduction, row_weights, backend, **options)
    lse, positive = _sums_and_positive(call, views, scale, normalize, row_ids=ids, column_ids=ids)
    if ids is None:
        loss = lse - positive
    else:  # the partner is left out of the sum too
        loss = minus_log_sigmoid(infinite_as_nan(positive) - infinite_as_nan(lse))
    return call.reduce(loss, reduction, 2, row_weights)


def _negatives_and_positive(call, views, scale, normalize):
    """As in dcl.py: log Σ exp over all views but a sample's own two, and the logit of its other view."""
    if call.total < 2:
        raise ValueError(f"{call.op}: the ranks must together have at least 2 rows of z0, got {call.total}")
    sample = torch.arange(views.shape[0] // 2, device=views.device).repeat(2)
    return _sums_and_positive(call, views, scale, normalize, row_ids=sample)


@over_ranks
def dcl_loss(
    call, z0, z1, temperature=0.1, *, normalize=True, reduction="mean", row_weights=None, backend=None
):
    views, scale = _two_views(call, z0, z1, temperature, reduction, row_weights, backend, normalize=normalize)
    lse, positive = _negatives_and_positive(call, views, scale, normalize)
    return call.reduce(lse - positive, reduction, 2, row_weights)


@over_ranks
def debiased_nt_xent_loss(
    call,
    z0,
    z1,
    temperature=0.5,
    *,
    positive_prior=0.1,
    normalize=True,
    reduction="mean",
    row_weights=None,
    backend=None,
):
    with call.checking():
        check_fraction(call.op, "positive_prior", positive_prior, below_one=True)
    options = {"normalize": normalize, "positive_prior": positive_prior}
    views, scale = _two_views(call, z0, z1, temperature, reduction, row_weights, backend, **options)
    lse, positive = map(infinite_as_nan, _negatives_and_positive(call, views, scale, normalize))
    # debiased.py explains it.
    negatives, prior = 2 * call.total - 2, number_operand(positive_prior, views)
    least = logarithm(negatives, views) - scale.double()
    excess = logarithm(negatives * prior, views) + positive - lse
    no_correction = excess >= 0
    corrected = (
        lse + torch.log(-torch.expm1(excess.masked_fill(no_correction, -1))) - logarithm(1 - prior, views)
    )
    log_negatives = torch.maximum(corrected, least).where(~no_correction, least)
    return call.reduce(minus_log_sigmoid(positive - log_negatives), reduction, 2, row_weights)


@over_ranks
def info_nce_loss(
    call,
    query,
    positive_key,
    negative_keys=None,
    temperature=0.1,
    reduction="mean",
    negative_mode="unpaired",
    *,
    symmetric=False,
    query_ids=None,
    key_ids=None,
    normalize=True,
    row_weights=None,
    backend=None,
):
    op = call.op
    with call.checking():
        if negative_keys is not None:
            query, positive_key, negative_keys = widest_under_autocast(query, positive_key, negative_keys)
        query, positive_key = checked_rows(op, 2, check_all_rows, query=query, positive_key=positive_key)
        check_scalar(op, "temperature", temperature, query, positive=True)
        call.check_common(reduction, row_weights, query.shape[0], query)
        if negative_keys is not None:
            if negative_mode == "unpaired":
                check_rows(op, query=query, negative_keys=negative_keys)
            elif query.shape[0]:
                _info_nce._check_negatives(query, negative_keys, negative_mode, symmetric)
            if symmetric or negative_mode not in _info_nce.NEGATIVE_MODES:
                _info_nce._check_negatives(query, query, negative_mode, symmetric)
        query_ids, key_ids = _info_nce._checked_ids(query, query_ids, key_ids, negative_keys)
    unpaired = negative_keys is not None and negative_mode == "unpaired"
    (negatives,) = call.meet(
        query,
        {
            "query": query,
            "positive_key": positive_key,
            "negative_keys": negative_keys if unpaired else None,
            "temperature": temperature,
            "row_weights": row_weights,
        },
        backend,
        extra=[negative_keys.shape[0] if unpaired else 0],
        reduction=reduction,
        normalize=normalize,
        symmetric=symmetric,
        negatives=None if negative_keys is None else negative_mode,
        ids=query_ids is not None,
    )
    scale = inverse(temperature, query)
    setting = call.setting(normalize)
    if negative_keys is None:
        lse, key_lse, positive = pairs.log_sums(
            query,
            positive_key,
            scale,
            setting,
            call.sizes,
            positives=torch.arange(query.shape[0], device=query.device),
            row_ids=query_ids,
            column_ids=key_ids,
            both=symmetric,
        )
        loss = ((lse + key_lse) / 2 if symmetric else lse) - positive
        return call.reduce(loss, reduction, row_weights=row_weights)

    query, positive_key = (pairs.widened(rows) for rows in (query, positive_key))
    positive = positive_logits(call, query, positive_key, scale, normalize)
    if unpaired:
        lse = pairs.log_sums(
            query,
            pairs.widened(negative_keys),
            scale,
            setting,
            negatives,
            row_ids=query_ids,
            column_ids=key_ids,
        )[0]
    else:
        logits = paired_logits(query, negative_keys, scale, normalize, False)
        if query_ids is not None:
            logits = logits.masked_fill(query_ids[:, None] == key_ids, -torch.inf)
        lse = infinite_as_nan(torch.logsumexp(logits, 1))
    loss = minus_log_sigmoid(infinite_as_nan(positive) - lse)
    return call.reduce(loss, reduction, row_weights=row_weights)


def _checked_features(op, image_features, text_features, ids, image_index):
    """((images, texts), ids, image_index) of a call of `clip_loss` or `siglip_loss`."""
    features = {"image_features": image_features, "text_features": text_features}
    images, texts = checked_rows(op, 2 if image_index is None else 1, check_all_rows, **features)
    return (images, texts), *checked_duplicates(op, ids, image_index, images, texts)


@over_ranks
def clip_loss(
    call,
    image_features,
    text_features,
    logit_scale,
    *,
    label_smoothing=0.0,
    ids=None,
    image_index=None,
    normalize=True,
    reduction="mean",
    row_weights=None,
    backend=None,
):
    op = call.op
    with call.checking():
        features, ids, image_index = _checked_features(op, image_features, text_features, ids, image_index)
        image_features, text_features = features
        check_scalar(op, "logit_scale", logit_scale, image_features, positive=False)
        check_fraction(op, "label_smoothing", label_smoothing)
        n = text_features.shape[0]
        call.check_common(reduction, row_weights, n, image_features)
        if ids is not None and label_smoothing:
            raise ValueError(f"{op}: label_smoothing must be 0 with ids, got {label_smoothing}")
    counts = call.meet(
        text_features,
        {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": logit_scale,
            "row_weights": row_weights,
        },
        backend,
        extra=[] if image_index is None else [image_features.shape[0]],
        reduction=reduction,
        normalize=normalize,
        label_smoothing=label_smoothing,
        ids=ids is not None,
        image_index=image_index is not None,
    )
    scale = as_scalar(logit_scale, image_features)
    if label_smoothing:
        image_features, text_features = pairs.widened(image_features), pairs.widened(text_features)
    rows, columns, sizes, of_row = image_features, text_features, call.sizes, slice(None)
    if image_index is not None:
        rows, columns, sizes, of_row = text_features, image_features, counts[0], image_index
    lse, column_lse, positive = pairs.log_sums(
        rows,
        columns,
        scale,
        call.setting(normalize),
        sizes,
        positives=torch.arange(n, device=rows.device) if image_index is None else image_index,
        row_ids=ids,
        column_ids=ids,
        both=True,
    )
    smoothing = number_operand(label_smoothing, rows)
    loss = (lse + column_lse[of_row]) / 2 - (1 - smoothing) * positive
    if label_smoothing:
        rows, columns = unit_rows(rows, normalize), unit_rows(columns, normalize)
        sums = groups.all_reduce(torch.stack((rows.sum(0), columns.sum(0))), call.ranks.name)
        means = row_dots(rows, sums[1] / sum(sizes)) + row_dots(columns, sums[0] / call.total)[of_row]
        loss = not_below_zero(loss - smoothing / 2 * scale * means)
    return call.reduce(loss, reduction, row_weights=row_weights)


@over_ranks
def siglip_loss(
    call,
    image_features,
    text_features,
    logit_scale,
    logit_bias,
    *,
    ids=None,
    image_index=None,
    normalize=True,
    reduction="mean",
    backend=None,
):
    op = call.op
    with call.checking():
        features, ids, image_index = _checked_features(op, image_features, text_features, ids, image_index)
        image_features, text_features = features
        check_scalar(op, "logit_scale", logit_scale, image_features, positive=False)
        check_scalar(op, "logit_bias", logit_bias, image_features, positive=False)
        call.check_common(reduction, None, 0, image_features)
    counts = call.meet(
        text_features,
        {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": logit_scale,
            "logit_bias": logit_bias,
        },
        backend,
        "sigmoid_pairs",
        extra=[] if image_index is None else [image_features.shape[0]],
        reduction=reduction,
        normalize=normalize,
        ids=ids is not None,
        image_index=image_index is not None,
    )
    scalars = as_scalar(logit_scale, image_features), as_scalar(logit_bias, image_features)
    rows, columns, sizes = image_features, text_features, call.sizes
    if image_index is not None:
        rows, columns, sizes = text_features, image_features, counts[0]
    marks = {"ids": ids, "column_of_row": image_index}
    loss = pairs.sigmoid_sums(rows, columns, *scalars, call.setting(normalize), sizes, **marks)
    return call.reduce(loss, reduction)


@over_ranks
def byol_loss(call, prediction, target, *, normalize=True, reduction="mean", row_weights=None, backend=None):
    op = call.op
    with call.checking():
        prediction, target = checked_rows(op, 2, check_all_rows, prediction=prediction, target=target)
        call.check_common(reduction, row_weights, prediction.shape[0], prediction)
    call.meet(
        prediction,
        {"prediction": prediction, "row_weights": row_weights},
        backend,
        "row_pairs",
        reduction=reduction,
        normalize=normalize,
    )
    one = torch.ones((), dtype=torch.float64, device=prediction.device)
    cosines = positive_logits(call, prediction, target.detach(), one, normalize)
    return call.reduce(2 - 2 * cosines, reduction, row_weights=row_weights)
