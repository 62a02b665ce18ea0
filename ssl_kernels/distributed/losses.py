"""The losses of the library over a process group. docs/distributed.md has the contract that all of them keep."""

import functools

import torch

from ssl_kernels import losses
from ssl_kernels.checks import check_fraction, check_same_rows, check_scalar
from ssl_kernels.distributed import groups, pairs
from ssl_kernels.distributed.call import Call
from ssl_kernels.distributed.checks import check_rows
from ssl_kernels.distributed.class_sums import classes_of, other_rows_mean
from ssl_kernels.distributed.hardest import hardest_rows
from ssl_kernels.losses import info_nce as _info_nce
from ssl_kernels.losses import moco as _moco
from ssl_kernels.losses import triplet as _triplet
from ssl_kernels.losses._labels import as_ids
from ssl_kernels.losses._rows import paired_logits, row_dots
from ssl_kernels.losses._shared import (
    as_operand,
    as_scalar,
    infinite_as_nan,
    inverse,
    logarithm,
    minus_log_sigmoid,
    not_below_zero,
    stacked,
    unit_rows,
    widest_under_autocast,
)
from ssl_kernels.ops.batch_hard import DISTANCES
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.row_pairs import row_pairs

_DOC = """

    Over a process group: each rank passes its own rows, any number of them, and gets a loss whose mean over the ranks
    is that of the rows of all ranks together. Where gradients are averaged over the ranks, as DistributedDataParallel
    and fully_shard do, every parameter gets the gradient of that mean. docs/distributed.md has the contract.

    Args:
        group: A process group or a DeviceMesh of one dimension; None is the default group. With one rank in it, this is
            `ssl_kernels.{name}`, whose other arguments it takes and documents; "reference" is no backend here.
        strategy: "gather" moves the rows of all ranks to every rank at once, "ring" a block at a time while the one
            before is computed, in memory that does not grow with the number of ranks. None gathers while the gathered
            rows and their gradients take at most 256 MB a rank.
        check: Compare widths, dtypes, flags and options of all ranks before rows move, and raise on every rank where
            they differ. Without it the ranks tell each other only how many rows they have.
        rows_per_rank: The number of rows of each rank, where it is known: with check=False nothing is exchanged before.

    Raises:
        RuntimeError: torch.distributed is not initialised; a rank is gone, once the group's timeout is over.
        TypeError, ValueError: As `ssl_kernels.{name}`, and where ranks differ.
    """


def _over_ranks(function):
    """`function`, which takes a `Call` first, as a public loss: the plain one where the group has one rank."""
    name = function.__name__
    plain = getattr(losses, name)

    @functools.wraps(plain, assigned=("__module__", "__name__", "__qualname__"))
    def run(*args, group=None, strategy=None, check=True, rows_per_rank=None, **options):
        call = Call(name, group=group, strategy=strategy, check=check, rows_per_rank=rows_per_rank)
        if call.alone:
            return plain(*args, **options)
        return function(call, *args, **options)

    run.__doc__ = plain.__doc__.split("\n", 1)[0] + _DOC.format(name=name)
    run.operation = plain.operation
    del run.__wrapped__
    return run


def _two_views(call, z0, z1, temperature, reduction, row_weights, backend, **options):
    """Checked rows of both views one above the other, and the scale."""
    with call.checking():
        z0, z1 = widest_under_autocast(z0, z1)
        check_rows(call.op, z0=z0, z1=z1)
        check_same_rows(call.op, z0=z0, z1=z1)
        check_scalar(call.op, "temperature", temperature, z0, positive=True)
        call.check_common(reduction, row_weights, 2 * z0.shape[0], z0)
    tensors = {"z0": z0, "z1": z1, "temperature": temperature, "row_weights": row_weights}
    call.meet(z0, tensors, backend, reduction=reduction, **options)
    return stacked(z0, z1), inverse(temperature, z0)


def _partners(views):
    """Where the other view of each row lies."""
    half = views.shape[0] // 2
    return torch.arange(2 * half, device=views.device).roll(half)


@_over_ranks
def nt_xent_loss(
    call, z0, z1, temperature=0.5, *, normalize=True, reduction="mean", row_weights=None, backend=None
):
    views, scale = _two_views(call, z0, z1, temperature, reduction, row_weights, backend, normalize=normalize)
    lse, _, positive = pairs.log_sums(
        views, None, scale, call.setting(normalize), call.rows_of(2), positives=_partners(views)
    )
    return call.reduce(lse - positive, reduction, 2, row_weights)


def _negatives_and_positive(call, views, scale, normalize):
    """As in dcl.py: log Σ exp over all views but a sample's own two, and the logit of its other view."""
    if call.total < 2:
        raise ValueError(f"{call.op}: the ranks must have at least 2 rows of z0 together, got {call.total}")
    sample = torch.arange(views.shape[0] // 2, device=views.device).repeat(2)
    lse, _, positive = pairs.log_sums(
        views,
        None,
        scale,
        call.setting(normalize),
        call.rows_of(2),
        positives=_partners(views),
        row_ids=sample,
    )
    return lse, positive


@_over_ranks
def dcl_loss(
    call, z0, z1, temperature=0.1, *, normalize=True, reduction="mean", row_weights=None, backend=None
):
    views, scale = _two_views(call, z0, z1, temperature, reduction, row_weights, backend, normalize=normalize)
    lse, positive = _negatives_and_positive(call, views, scale, normalize)
    return call.reduce(lse - positive, reduction, 2, row_weights)


@_over_ranks
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
    negatives = 2 * call.total - 2
    least = logarithm(negatives, views) - scale.double()
    excess = logarithm(negatives * positive_prior, views) + positive - lse
    no_correction = excess >= 0
    corrected = (
        lse
        + torch.log(-torch.expm1(excess.masked_fill(no_correction, -1)))
        - logarithm(1 - positive_prior, views)
    )
    log_negatives = torch.maximum(corrected, least).where(~no_correction, least)
    return call.reduce(minus_log_sigmoid(positive - log_negatives), reduction, 2, row_weights)


@_over_ranks
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
        if negative_keys is None:
            query, positive_key = widest_under_autocast(query, positive_key)
        else:
            query, positive_key, negative_keys = widest_under_autocast(query, positive_key, negative_keys)
        check_rows(op, query=query, positive_key=positive_key)
        check_same_rows(op, query=query, positive_key=positive_key)
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
    positive = _positive_logits(call, query, positive_key, scale, normalize)
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


def _positive_logits(call, query, key, scale, normalize):
    """scale · <q̂_i, k̂_i>, (n,) float64, also of no rows."""
    if not query.shape[0]:
        return scale.double() * row_dots(query, key)
    options = {"normalize": normalize, "backend": call.backend, "caller": call.op}
    return scale * row_pairs(query, key, measure="product", **options)


@_over_ranks
def moco_loss(
    call,
    query,
    key,
    queue=None,
    temperature=0.07,
    *,
    normalize=True,
    symmetric=False,
    reduction="mean",
    backend=None,
):
    op = call.op
    sharded = hasattr(queue, "shard")
    with call.checking():
        query, key = widest_under_autocast(query, key)
        check_rows(op, query=query, key=key)
        check_same_rows(op, query=query, key=key)
        check_scalar(op, "temperature", temperature, query, positive=True)
        call.check_common(reduction, None, query.shape[0], query)
        if symmetric and query.shape[0] % 2:
            raise ValueError(
                f"{op}: query must have an even number of rows with symmetric, got {query.shape[0]}"
            )
        if queue is not None:
            held = queue.shard if sharded else queue.storage if hasattr(queue, "negatives") else queue
            _moco._check_queue(query, held)
            if sharded and queue.group_name != call.ranks.name:
                raise ValueError(f"{op}: group must be the one that divides the queue, got another")
    options = {"reduction": reduction, "normalize": normalize, "symmetric": symmetric}
    options["queue"] = None if queue is None else "sharded" if sharded else "whole"
    if hasattr(queue, "filled") and call.check and not torch.compiler.is_compiling():
        options |= {"queue position": int(queue.position), "queue fill count": int(queue.filled)}
    call.meet(query, {"query": query, "temperature": temperature}, backend, **options)
    scale = inverse(temperature, query)
    key = key.detach()
    if symmetric:
        key = stacked(*key.chunk(2)[::-1]) if key.shape[0] else key
    setting = call.setting(normalize)
    query, keys = pairs.widened(query), key  # keys travel as they are
    positive = _positive_logits(call, query, pairs.widened(key), scale, normalize)
    if queue is None:
        views = 2 if symmetric else 1
        sizes = tuple(count // views for count in call.sizes)
        spans = [slice(v * sizes[setting.rank], (v + 1) * sizes[setting.rank]) for v in range(views)]
        merged = [
            pairs.frozen_columns(query[span], keys[span], scale, setting, sizes, normalize) for span in spans
        ]
        lse = torch.cat(
            [
                pairs.log_sums_with_expectation(scale * unit_rows(query[span], normalize), *of_view)
                for span, of_view in zip(spans, merged, strict=True)
            ]
        )
        return call.reduce(lse - positive, reduction)
    if sharded:
        merged = pairs.travelling_rows(query, queue.filled_shard, scale, setting, call.sizes)
        lse = pairs.log_sums_with_expectation(scale * unit_rows(query, normalize), *merged)
    elif not query.shape[0]:
        lse = positive - positive.detach()
    else:
        columns, row_ids, column_ids = queue, None, None
        if hasattr(queue, "negatives"):
            columns, row_ids, column_ids = queue.negatives(query.shape[0])
        lse = contrastive(
            query,
            columns.detach(),
            scale,
            row_ids=row_ids,
            column_ids=column_ids,
            normalize_rows=normalize,
            normalize_columns=False,
            backend=backend,
            caller=op,
        ).lse
    return call.reduce(minus_log_sigmoid(infinite_as_nan(positive) - lse), reduction)


@_over_ranks
def clip_loss(
    call,
    image_features,
    text_features,
    logit_scale,
    *,
    label_smoothing=0.0,
    ids=None,
    normalize=True,
    reduction="mean",
    row_weights=None,
    backend=None,
):
    op = call.op
    with call.checking():
        image_features, text_features = widest_under_autocast(image_features, text_features)
        check_rows(op, image_features=image_features, text_features=text_features)
        check_same_rows(op, image_features=image_features, text_features=text_features)
        check_scalar(op, "logit_scale", logit_scale, image_features, positive=False)
        check_fraction(op, "label_smoothing", label_smoothing)
        n = image_features.shape[0]
        call.check_common(reduction, row_weights, n, image_features)
        if ids is not None:
            ids = as_ids(op, "ids", ids, (n,), image_features)
            if label_smoothing:
                raise ValueError(f"{op}: label_smoothing must be 0 with ids, got {label_smoothing}")
    call.meet(
        image_features,
        {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": logit_scale,
            "row_weights": row_weights,
        },
        backend,
        reduction=reduction,
        normalize=normalize,
        label_smoothing=label_smoothing,
        ids=ids is not None,
    )
    scale = as_scalar(logit_scale, image_features)
    if label_smoothing:
        image_features, text_features = pairs.widened(image_features), pairs.widened(text_features)
    lse, text_lse, positive = pairs.log_sums(
        image_features,
        text_features,
        scale,
        call.setting(normalize),
        call.sizes,
        positives=torch.arange(n, device=image_features.device),
        row_ids=ids,
        column_ids=ids,
        both=True,
    )
    loss = (lse + text_lse) / 2 - (1 - label_smoothing) * positive
    if label_smoothing:
        images, texts = unit_rows(image_features, normalize), unit_rows(text_features, normalize)
        sums = groups.all_reduce(torch.stack((images.sum(0), texts.sum(0))), call.ranks.name)
        means = sums / call.total
        means = row_dots(images, means[1]) + row_dots(texts, means[0])
        loss = not_below_zero(loss - label_smoothing / 2 * scale * means)
    return call.reduce(loss, reduction, row_weights=row_weights)


@_over_ranks
def siglip_loss(
    call,
    image_features,
    text_features,
    logit_scale,
    logit_bias,
    *,
    normalize=True,
    reduction="mean",
    backend=None,
):
    op = call.op
    with call.checking():
        image_features, text_features = widest_under_autocast(image_features, text_features)
        check_rows(op, image_features=image_features, text_features=text_features)
        check_same_rows(op, image_features=image_features, text_features=text_features)
        check_scalar(op, "logit_scale", logit_scale, image_features, positive=False)
        check_scalar(op, "logit_bias", logit_bias, image_features, positive=False)
        call.check_common(reduction, None, 0, image_features)
    call.meet(
        image_features,
        {
            "image_features": image_features,
            "text_features": text_features,
            "logit_scale": logit_scale,
            "logit_bias": logit_bias,
        },
        backend,
        "sigmoid_pairs",
        reduction=reduction,
        normalize=normalize,
    )
    scalars = as_scalar(logit_scale, image_features), as_scalar(logit_bias, image_features)
    loss = pairs.sigmoid_sums(image_features, text_features, *scalars, call.setting(normalize), call.sizes)
    return call.reduce(loss, reduction)


@_over_ranks
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
        if positives is not None:
            raise ValueError(
                f"{op}: positives must be None over several ranks, got {type(positives).__name__}"
            )
        if isinstance(labels, torch.Tensor) and labels.dim() == 2 and labels.shape[1] > 1:
            raise ValueError(
                f"{op}: labels must have shape (N,) over several ranks, got {tuple(labels.shape)}"
            )
        labels = as_ids(op, "labels", labels, (features.shape[0],), features)
        if unlabelled is not None and (isinstance(unlabelled, bool) or int(unlabelled) != unlabelled):
            raise TypeError(f"{op}: unlabelled must be an integer or None, got {unlabelled!r}")
        check_scalar(op, "temperature", temperature, features, positive=True)
        call.check_common(reduction, row_weights, features.shape[0], features)
    call.meet(
        features,
        {"features": features, "temperature": temperature, "row_weights": row_weights},
        backend,
        reduction=reduction,
        normalize=normalize,
        unlabelled=unlabelled,
    )
    scale = inverse(temperature, features)
    features = pairs.widened(features)
    setting = call.setting(normalize)
    lse = pairs.log_sums(features, None, scale, setting, call.sizes)[0]
    classes = classes_of(labels, unlabelled, call.sizes, call.ranks)
    rows = unit_rows(features, normalize)
    mean = other_rows_mean(rows, classes, call.sizes, call.ranks.name)
    loss = lse - scale * row_dots(rows, mean)
    has_positive = classes.others > 0
    loss = not_below_zero(loss).where(has_positive, 0)
    return call.reduce(loss, reduction, row_weights=row_weights, counted=has_positive)


@_over_ranks
def byol_loss(call, prediction, target, *, normalize=True, reduction="mean", row_weights=None, backend=None):
    op = call.op
    with call.checking():
        prediction, target = widest_under_autocast(prediction, target)
        check_rows(op, prediction=prediction, target=target)
        check_same_rows(op, prediction=prediction, target=target)
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
    cosines = _positive_logits(call, prediction, target.detach(), one, normalize)
    return call.reduce(2 - 2 * cosines, reduction, row_weights=row_weights)


@_over_ranks
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
        _triplet.check_margin(op, margin, embeddings)
        if mining not in _triplet.MININGS:
            raise ValueError(f'{op}: mining must be "batch_hard", got {mining!r}')
        if distance not in DISTANCES:
            raise ValueError(f'{op}: distance must be "euclidean" or "cosine", got {distance!r}')
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
    loss = torch.relu(gaps.double() + as_operand(margin, embeddings)).where(complete, 0)
    return call.reduce(loss, reduction, counted=complete)


def _length(x):
    """‖row‖₂, with gradient 0 at 0."""
    squares = x.square().sum(1)
    zero = squares == 0
    return squares.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)
