"""`moco_loss` over a process group: the queue on every rank, divided among them, or none."""

import torch

from ssl_kernels.checks import check_scalar
from ssl_kernels.distributed import pairs
from ssl_kernels.distributed.checks import check_all_rows
from ssl_kernels.distributed.over_ranks import over_ranks
from ssl_kernels.distributed.positive_logits import positive_logits
from ssl_kernels.losses import moco as _moco
from ssl_kernels.losses._shared import (
    checked_rows,
    infinite_as_nan,
    inverse,
    minus_log_sigmoid,
    stacked,
    unit_rows,
)
from ssl_kernels.ops.contrastive import contrastive


@over_ranks
def moco_loss(
    call,
    query,
    key,
    queue=None,
    temperature=0.07,
    *,
    ids=None,
    queue_ids=None,
    normalize=True,
    symmetric=False,
    reduction="mean",
    backend=None,
):
    op = call.op
    sharded = hasattr(queue, "shard")
    with call.checking():
        query, key = checked_rows(op, 2, check_all_rows, query=query, key=key)
        check_scalar(op, "temperature", temperature, query, positive=True)
        call.check_common(reduction, None, query.shape[0], query)
        if symmetric and query.shape[0] % 2:
            raise ValueError(
                f"{op}: query must have an even number of rows with symmetric, got {query.shape[0]}"
            )
        ids, queue_ids = _moco._checked_ids(query, queue, ids, queue_ids)
        if sharded and queue.group_name != call.ranks.name:
            raise ValueError(f"{op}: group must be the one that divides the queue, got another")
    options = {"reduction": reduction, "normalize": normalize, "symmetric": symmetric, "ids": ids is not None}
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
    positive = positive_logits(call, query, pairs.widened(key), scale, normalize)
    if queue is None:
        views = 2 if symmetric else 1
        sizes = tuple(count // views for count in call.sizes)
        spans = [slice(v * sizes[setting.rank], (v + 1) * sizes[setting.rank]) for v in range(views)]
        merged = [
            pairs.frozen_columns(
                query[span], keys[span], scale, setting, sizes, normalize, None if ids is None else ids[span]
            )
            for span in spans
        ]
        lse = torch.cat(
            [
                pairs.log_sums_with_expectation(scale * unit_rows(query[span], normalize), *of_view)
                for span, of_view in zip(spans, merged, strict=True)
            ]
        )
        return call.reduce(lse - positive, reduction)
    if sharded:
        of_shard = None if ids is None else queue.filled_ids
        merged = pairs.travelling_rows(query, queue.filled_shard, scale, setting, call.sizes, ids, of_shard)
        lse = pairs.log_sums_with_expectation(scale * unit_rows(query, normalize), *merged)
    elif not query.shape[0]:
        lse = positive - positive.detach()
    else:
        columns, row_ids, column_ids, added = _moco._negatives(query, queue, scale, ids, queue_ids)
        lse = contrastive(
            query,
            columns,
            scale,
            row_ids=row_ids,
            column_ids=column_ids,
            normalize_rows=normalize,
            normalize_columns=False,
            backend=backend,
            caller=op,
            **added,
        ).lse
    return call.reduce(minus_log_sigmoid(infinite_as_nan(positive) - lse), reduction)
