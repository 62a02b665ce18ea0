"""InfoNCE, in the batch or with negatives of its own."""

import torch

from ssl_kernels.backends import check_name
from ssl_kernels.checks import (
    check_choice,
    check_embeddings,
    check_reduction,
    check_scalar,
    check_tensor,
    shape_error,
)
from ssl_kernels.losses._labels import as_ids
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._rows import paired_logits
from ssl_kernels.losses._shared import (
    as_scalar,
    checked_rows,
    infinite_as_nan,
    inverse_operand,
    loss_beside,
    rows_for_several,
    runs_natively,
    widest_under_autocast,
)
from ssl_kernels.losses._softmax import is_one_node, one_node, pairs_loss
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.row_pairs import row_pairs

OP = "info_nce_loss"
NEGATIVE_MODES = ("unpaired", "paired")


def info_nce_loss(
    query: torch.Tensor,
    positive_key: torch.Tensor,
    negative_keys: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
    *,
    symmetric: bool = False,
    query_ids: torch.Tensor | None = None,
    key_ids: torch.Tensor | None = None,
    normalize: bool = True,
    row_weights: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """InfoNCE: each query against its own key and the negatives.

        loss_i = −log( exp(s_i) / (exp(s_i) + Σ_j exp(s_ij)) ),  s = <query, key> / temperature

    with s_i of the own key and s_ij of the negatives j: without negative_keys the other queries' keys, else the rows
    of negative_keys, shared by all queries ("unpaired") or each query's own ("paired"). Natural logarithm.

    Args:
        query, positive_key: (N, D) each, row i of both from the same sample. float64, float32, float16 or bfloat16,
            any strides. Under autocast they may differ in dtype; the widest is used.
        negative_keys: None, (M, D) for "unpaired" or (N, M, D) for "paired", dtype and device of query. All three
            get their gradient.
        temperature: > 0, a float or a tensor of one element, which gets its gradient.
        reduction: "mean", "sum" or "none", over the N queries.
        negative_mode: "unpaired" or "paired"; not read without negative_keys.
        symmetric: The mean with the loss of each key against the queries. Only without negative_keys.
        query_ids: (N,) or (N, 1) integers or bool, or None. A negative whose id equals the query's is left out: a known
            duplicate.
        key_ids: Ids of the negatives: (N,) of positive_key without negative_keys, where None means query_ids; else
            (M,) or (N, M). A query's own key always stays in. A query with no negative left has loss 0.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12).
        row_weights: (N,) floating, or None. "none" and "sum" take weight · loss, "mean" divides their sum by that of
            the weights.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`). The
            logits of "paired" negatives are torch's batched product on every backend: as large as their input.

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none".

    Raises:
        TypeError: An argument is no tensor of the kind above, or dtypes differ outside autocast.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, temperature not > 0, an unknown reduction,
            negative_mode or backend, symmetric with negative_keys, or only one of query_ids and key_ids where
            both are needed.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: van den Oord et al., arXiv:1807.03748; docs/losses.md derives the algebra.
    """
    if negative_keys is not None:
        query, positive_key, negative_keys = widest_under_autocast(query, positive_key, negative_keys)
    query, positive_key = checked_rows(OP, 2, query=query, positive_key=positive_key)
    _check_negatives(query, negative_keys, negative_mode, symmetric)
    check_scalar(OP, "temperature", temperature, query, positive=True)
    check_reduction(OP, reduction, row_weights, query.shape[0], query)
    check_name(OP, backend)
    query_ids, key_ids = _checked_ids(query, query_ids, key_ids, negative_keys)

    if negative_keys is None:
        return pairs_loss(
            query,
            positive_key,
            inverse_operand(temperature, query),
            reduction,
            row_weights,
            row_ids=query_ids,
            column_ids=key_ids,
            both_directions=symmetric,
            normalize=normalize,
            backend=backend,
            caller=OP,
        )
    scale = inverse_operand(temperature, query)
    options = {
        "row_ids": query_ids,
        "column_ids": key_ids,
        "normalize_rows": normalize,
        "normalize_columns": normalize,
        "backend": backend,
        "caller": OP,
    }
    query, positive_key = (rows_for_several(rows, backend, OP) for rows in (query, positive_key))
    products = row_pairs(
        query, positive_key, normalize=normalize, measure="product", backend=backend, caller=OP
    )
    if negative_mode == "unpaired":
        if is_one_node(backend, OP, reduction, row_weights, query, negative_keys, scale, products):
            ids = {"row_ids": query_ids, "column_ids": key_ids}
            more = {"numbers": products, "normalize": normalize, "reduction": reduction}
            return one_node(query, negative_keys, scale, **ids, **more)[0]
        scale = as_scalar(scale, query)
        lse = contrastive(query, negative_keys, scale, **options).lse
    else:
        scale = as_scalar(scale, query)
        native = runs_natively(backend, OP, query)
        logits = paired_logits(query, negative_keys, scale, normalize, native)
        if query_ids is not None:
            logits = logits.masked_fill(query_ids[:, None] == key_ids, -torch.inf)
        lse = infinite_as_nan(torch.logsumexp(logits, 1))
    return loss_beside(products, scale, lse, reduction, query, row_weights, backend=backend, caller=OP)


info_nce_loss.operation = "contrastive"


def _check_negatives(query, negative_keys, negative_mode, symmetric):
    if negative_keys is None:
        return
    check_choice(OP, "negative_mode", negative_mode, *NEGATIVE_MODES)
    if symmetric:
        raise ValueError(f"{OP}: symmetric must be False with negative_keys, got {symmetric!r}")
    if negative_mode == "unpaired":
        check_embeddings(OP, query=query, negative_keys=negative_keys)
        return
    check_tensor(OP, "negative_keys", negative_keys)
    if negative_keys.dim() != 3 or negative_keys.shape[0] != query.shape[0] or 0 in negative_keys.shape:
        raise shape_error(
            OP, "negative_keys", f"({query.shape[0]}, M, {query.shape[1]}) with M >= 1", negative_keys
        )
    check_embeddings(OP, query=query, negative_keys=negative_keys[0])


def _checked_ids(query, query_ids, key_ids, negative_keys):
    """Ids of queries and of what they are held against, int64, or (None, None)."""
    if query_ids is None and key_ids is None:
        return None, None
    if query_ids is None:
        raise ValueError(f"{OP}: query_ids must be given with key_ids, got None")
    if key_ids is None:
        if negative_keys is not None:
            raise ValueError(f"{OP}: key_ids must be given with query_ids and negative_keys, got None")
        key_ids = query_ids
    keys = query if negative_keys is None else negative_keys
    return (
        as_ids(OP, "query_ids", query_ids, (query.shape[0],), query),
        as_ids(OP, "key_ids", key_ids, keys.shape[:-1], query),
    )


class InfoNCELoss(Loss):
    """`ssl_kernels.info_nce_loss` as a module: `InfoNCELoss(temperature=0.1)(query, positive_key, negative_keys)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        reduction, negative_mode, symmetric, normalize, backend: As in `info_nce_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.1,
        reduction: str = "mean",
        negative_mode: str = "unpaired",
        *,
        symmetric: bool = False,
        normalize: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        query: torch.Tensor,
        positive_key: torch.Tensor,
        negative_keys: torch.Tensor | None = None,
        *,
        query_ids: torch.Tensor | None = None,
        key_ids: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return info_nce_loss(
            query,
            positive_key,
            negative_keys,
            query_ids=query_ids,
            key_ids=key_ids,
            row_weights=row_weights,
            **self.options,
        )
