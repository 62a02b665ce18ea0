"""The losses of MoCo: InfoNCE against a queue, and in the batch."""

from typing import TYPE_CHECKING

import torch

from ssl_kernels.checks import DTYPES, check_device, check_reduction, check_scalar, shape_error
from ssl_kernels.losses._labels import as_ids
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import checked_rows, inverse, loss_beside, reduce, rows_for_several, stacked
from ssl_kernels.losses._softmax import is_one_node, one_node
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import accumulation_dtype
from ssl_kernels.ops.row_pairs import row_pairs

if TYPE_CHECKING:
    from ssl_kernels.nn.queue import MoCoQueue


def moco_loss(
    query: torch.Tensor,
    key: torch.Tensor,
    queue: "MoCoQueue | torch.Tensor | None" = None,
    temperature: float | torch.Tensor = 0.07,
    *,
    ids: torch.Tensor | None = None,
    queue_ids: torch.Tensor | None = None,
    normalize: bool = True,
    symmetric: bool = False,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """InfoNCE of each query against its key and a queue of negatives.

        loss_i = −log( exp(s_i) / (exp(s_i) + Σ_j exp(<q_i, queue_j> / temperature)) ),  s_i = <q_i, k_i> / temperature

    One pass over the queue, whose logits are never stored; backward reads it no more, so `queue.push_(key)` may come
    before or after `loss.backward()`. (A backend that has to read it again raises if it was overwritten.)

    Args:
        query: (N, D), float64, float32, float16 or bfloat16, any strides. Gets the gradient.
        key: (N, D), like query, of the momentum encoder; no gradient. Under autocast both may differ in dtype.
        queue: An `nn.MoCoQueue`, of which the filled rows count, or a (K, D) tensor of unit rows. Of any of the
            four dtypes, but float64 goes with float64 alone. None: the other keys of the batch are the negatives.
        temperature: > 0, a float or a tensor of one element, which gets its gradient.
        ids: (N,) or (N, 1) integers or bool, or None. A negative whose id equals the query's is left out: another
            view of its sample. The negatives' ids are those of the `MoCoQueue`, made with `ids=True`; queue_ids; or
            without a queue those of the other queries. The own key always stays.
        queue_ids: (K,) or (K, 1), the ids of a queue that is a tensor; given if and only if ids are.
        normalize: L2-normalise the rows of query and key first. The queue is taken as it is.
        symmetric: query holds the predictions of view 0 above those of view 1, key likewise; each query's positive
            is the key of the other view, and without a queue the negatives are the other keys of that view.
            The mean over all 2B rows is half of what MoCo v2+ and v3 add up.
        reduction: "mean", "sum" or "none".
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 queries): a scalar, or (N,) for "none". With an empty queue the loss is 0.

    Raises:
        TypeError: query, key or queue is no floating tensor, or their dtypes do not go together.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, temperature not > 0, ids of one side
            alone, an unknown reduction or backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: He et al., MoCo, arXiv:1911.05722, eq. 1; Chen et al., MoCo v2, arXiv:2003.04297, and MoCo v3,
    arXiv:2104.02057, algorithm 1 (whose factor 2 · temperature is left to the caller).
    """
    op = "moco_loss"
    query, key = checked_rows(op, 2, query=query, key=key)
    check_scalar(op, "temperature", temperature, query, positive=True)
    check_reduction(op, reduction)
    if symmetric and query.shape[0] % 2:
        raise ValueError(f"{op}: query must have an even number of rows with symmetric, got {query.shape[0]}")
    ids, queue_ids = _checked_ids(query, queue, ids, queue_ids)
    scale = inverse(temperature, query)
    key = key.detach()
    if symmetric:
        key = stacked(*key.chunk(2)[::-1])
    if queue is None:
        loss = _in_batch(query, key, scale, ids, normalize, 2 if symmetric else 1, backend)
        return reduce(loss, reduction, query)
    return _against_queue(query, key, queue, scale, ids, queue_ids, normalize, reduction, backend)


moco_loss.operation = "contrastive"


def _in_batch(query, key, scale, ids, normalize, views, backend):
    """Rows' losses; the keys of each view are the columns of its queries."""
    losses = []
    of_views = [None] * views if ids is None else ids.chunk(views)
    for rows, columns, own_ids in zip(query.chunk(views), key.chunk(views), of_views, strict=True):
        lse, _, positive = contrastive(
            rows,
            columns,
            scale,
            positives=torch.arange(rows.shape[0], device=rows.device),
            row_ids=own_ids,
            column_ids=own_ids,
            keep_diagonal=own_ids is not None,
            normalize_rows=normalize,
            normalize_columns=normalize,
            backend=backend,
            caller="moco_loss",
        )
        losses.append(lse - positive)
    return torch.cat(losses)


def _against_queue(query, key, queue, scale, ids, queue_ids, normalize, reduction, backend):
    columns, row_ids, column_ids, added = _negatives(query, queue, scale, ids, queue_ids)
    query, key = (rows_for_several(rows, backend, "moco_loss") for rows in (query, key))
    products = row_pairs(
        query, key, normalize=normalize, measure="product", backend=backend, caller="moco_loss"
    )
    if is_one_node(backend, "moco_loss", reduction, None, query, columns, scale, products, *added.values()):
        options = {"row_ids": row_ids, "column_ids": column_ids, "numbers": products, **added}
        options |= {"normalize": normalize, "normalize_others": False, "reduction": reduction}
        return one_node(query, columns, scale, **options)[0]
    lse = contrastive(
        query,
        columns,
        scale,
        row_ids=row_ids,
        column_ids=column_ids,
        normalize_rows=normalize,
        normalize_columns=False,
        backend=backend,
        caller="moco_loss",
        **added,
    ).lse
    return loss_beside(products, scale, lse, reduction, query, backend=backend, caller="moco_loss")


def _negatives(query, queue, scale, ids, queue_ids):
    """(columns, row_ids, column_ids, further options) of `contrastive` for a queue."""
    if not hasattr(queue, "negatives"):
        return queue.detach(), ids, queue_ids, {}
    if ids is None:
        return *queue.negatives(query.shape[0]), {}
    columns, row_ids, column_ids, bias = queue.negatives_with_ids(ids)
    return columns, row_ids, column_ids, {} if bias is None else {"column_bias": bias.to(scale.dtype)}


def _checked_ids(query, queue, ids, queue_ids):
    """int64 ids of queries and of a queue that is a tensor, and the check of the queue; None where there are none."""
    op = "moco_loss"
    is_tensor = queue is not None and not hasattr(queue, "negatives")
    if queue is not None:
        _check_queue(query, queue if is_tensor else queue.storage)
    if queue_ids is not None and not is_tensor:
        raise ValueError(f"{op}: queue_ids must be None unless queue is a tensor")
    if is_tensor and (ids is None) != (queue_ids is None):
        given, missing = ("ids", "queue_ids") if queue_ids is None else ("queue_ids", "ids")
        raise ValueError(f"{op}: {missing} must be given with {given} where queue is a tensor, got None")
    if ids is not None:
        ids = as_ids(op, "ids", ids, (query.shape[0],), query)
        if hasattr(queue, "negatives") and not queue.has_ids:
            raise ValueError(f"{op}: queue must hold ids with ids, as MoCoQueue(..., ids=True) does")
    if queue_ids is not None:
        queue_ids = as_ids(op, "queue_ids", queue_ids, (queue.shape[0],), query)
    return ids, queue_ids


def _check_queue(query, queue):
    op = "moco_loss"
    if not isinstance(queue, torch.Tensor):
        raise TypeError(f"{op}: queue must be a MoCoQueue or a tensor, got {type(queue).__name__}")
    if queue.dtype not in DTYPES or accumulation_dtype(queue) != accumulation_dtype(query):
        raise TypeError(
            f"{op}: queue must be floating, and float64 goes with float64 alone,"
            f" got {queue.dtype} beside queries of {query.dtype}"
        )
    if queue.dim() != 2 or queue.shape[0] == 0 or queue.shape[1] != query.shape[1]:
        raise shape_error(op, "queue", f"(K, {query.shape[1]}) with K >= 1", queue)
    check_device(op, "queue", queue, query, "query")


class MoCoLoss(Loss):
    """`ssl_kernels.moco_loss` as a module: `MoCoLoss(temperature=0.07)(query, key, queue)`.

    The queue is an argument and no part of the module: an `nn.MoCoQueue`, a tensor, or None for MoCo v3's loss.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        normalize, symmetric, reduction, backend: As in `moco_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.07,
        *,
        normalize: bool = True,
        symmetric: bool = False,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        queue: "MoCoQueue | torch.Tensor | None" = None,
        *,
        ids: torch.Tensor | None = None,
        queue_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return moco_loss(query, key, queue, ids=ids, queue_ids=queue_ids, **self.options)
