"""Sampled softmax of two-tower recommenders: in-batch and sampled candidates, corrected by their probability."""

import torch

from ssl_kernels.checks import (
    check_floating,
    check_reduction,
    check_scalar,
    check_shape,
    check_whole,
    values_are_readable,
)
from ssl_kernels.chunked.rows import LOGITS_PER_BLOCK
from ssl_kernels.losses._labels import as_ids
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import (
    checked_rows,
    inverse,
    inverse_operand,
    minus_log_sigmoid,
    reduce,
    rows_for_several,
    stacked,
    unit_rows,
)
from ssl_kernels.losses._softmax import pairs_loss
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import accumulation_dtype, savable
from ssl_kernels.ops.row_pairs import row_pairs

OP = "sampled_softmax_loss"


def sampled_softmax_loss(
    query: torch.Tensor,
    item: torch.Tensor,
    candidates: torch.Tensor | None = None,
    *,
    temperature: float | torch.Tensor = 1.0,
    item_ids: torch.Tensor | None = None,
    candidate_ids: torch.Tensor | None = None,
    log_q: torch.Tensor | None = None,
    candidate_weights: torch.Tensor | None = None,
    in_batch: bool = True,
    num_hard_negatives: int | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Softmax of each query over its item, the other items of the batch and sampled candidates, corrected by log Q.

        loss_i = log Σ_{j allowed} exp(z_ij) − z_ii,  z_ij = <q̂_i, ĉ_j> / temperature − log Q_j + log w_j

    over the columns c: the items of the batch, then the candidates. The correction by log Q, of how probable it is that
    a column is there, makes the softmax over a sample that over all items.

    Args:
        query, item: (N, D) each, row i of both belong together. float64, float32, float16 or bfloat16, any strides.
        candidates: (M, D), further negatives of all queries, or None. Under autocast they may differ in dtype; the
            widest is used. All three get their gradient.
        temperature: > 0, a float or a tensor of one element, which gets its gradient.
        item_ids: (N,) or (N, 1) integers or bool, or None. A column of the same id as the query's own item is an
            accidental hit and left out of its row; the own item stays.
        candidate_ids: (M,) or (M, 1), the ids of candidates: with candidates, given if and only if item_ids are.
        log_q: log Q of the columns, (N + M,) floating, those of the items first, without in_batch too; or None. Gets
            its gradient. A column of +inf is left out.
        candidate_weights: (N + M,) floating >= 0, how many times each column counts; or None. The own item's too.
            Columns of weight 0 are left out.
        in_batch: Whether the items of other queries are among the negatives; False needs candidates.
        num_hard_negatives: Only so many negatives count, those with the largest z_ij; or None.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12). TFRS does not.
        reduction: "mean" over the N queries, "sum" (as TFRS), or "none".
        row_weights: (N,) floating, or None. "none" and "sum" take weight · loss, "mean" divides their sum by that of
            the weights.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`). Hard
            negatives are searched in blocks of rows by torch on every backend.

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none". A query without a negative has loss 0.

    Raises:
        TypeError: An argument is no tensor or number of the kind above, or dtypes differ outside autocast.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, temperature not > 0, ids of one side alone,
            in_batch=False without candidates, an unknown reduction or backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Bengio & Senécal, Adaptive importance sampling, 2008; Yi et al., Sampling-Bias-Corrected Neural Modeling
    for Large Corpus Item Recommendations, 2019, eq. 3; TensorFlow Recommenders, `tasks.Retrieval`.
    """
    rows = {"query": query, "item": item, "candidates": candidates}
    query, item, candidates = checked_rows(OP, 2, optional="candidates", **rows)
    check_scalar(OP, "temperature", temperature, query, positive=True)
    n = query.shape[0]
    check_reduction(OP, reduction, row_weights, n, query)
    if not in_batch and candidates is None:
        raise ValueError(f"{OP}: candidates must be given with in_batch=False, got None")
    check_whole(OP, "num_hard_negatives", num_hard_negatives, 1, optional=True)
    item_ids, candidate_ids = _checked_ids(query, candidates, item_ids, candidate_ids)
    bias = _checked_bias(
        query, n + (0 if candidates is None else candidates.shape[0]), log_q, candidate_weights
    )

    if in_batch:
        columns, column_ids = item, item_ids
        if candidates is not None:
            columns = stacked(item, candidates)
            column_ids = None if item_ids is None else torch.cat((item_ids, candidate_ids))
        if num_hard_negatives is None:
            ids = {"row_ids": item_ids, "column_ids": column_ids}
            more = {"column_bias": bias, "normalize": normalize, "backend": backend, "caller": OP}
            return pairs_loss(
                query, columns, inverse_operand(temperature, query), reduction, row_weights, **ids, **more
            )
        own = torch.arange(n, device=query.device)
    scale = inverse(temperature, query)
    options = {"normalize_rows": normalize, "normalize_columns": normalize, "backend": backend, "caller": OP}
    if not in_batch:
        own = None
        query, item = (rows_for_several(rows, backend, OP) for rows in (query, item))
        columns, column_ids = candidates.to(query.dtype), candidate_ids
        logit = scale * row_pairs(
            query, item, normalize=normalize, measure="product", backend=backend, caller=OP
        )
        if bias is not None:
            logit, bias = logit + bias[:n].double(), bias[n:]
    if num_hard_negatives is not None:
        with torch.no_grad():
            count = min(num_hard_negatives, columns.shape[0])
            hardest, there = _hardest(
                query, columns, scale, bias, item_ids, column_ids, own, count, normalize
            )
        chosen = hardest if own is None else torch.cat((own[:, None], hardest), 1)
        logits = contrastive(query, columns, scale, positives=chosen, **options).positive_logits
        if bias is not None:
            logits = logits + bias.double()[chosen]
        if own is not None:
            logit, logits = logits[:, 0], logits[:, 1:]
        # Left out by adding, not by filling: a row without a negative gets a gradient of 0 and not NaN.
        any_there = there.any(1)
        logits = logits.masked_fill(~there, -torch.inf).masked_fill(~any_there[:, None], 0)
        negatives = logits.logsumexp(1).masked_fill(~any_there, -torch.inf)
        loss = minus_log_sigmoid(logit - negatives)
    else:
        ids = {"row_ids": item_ids, "column_ids": column_ids}
        added = {} if bias is None else {"column_bias": bias}
        loss = minus_log_sigmoid(logit - contrastive(query, columns, scale, **ids, **added, **options).lse)
    return reduce(loss, reduction, query, row_weights)


sampled_softmax_loss.operation = "contrastive"


def _hardest(query, columns, scale, bias, row_ids, column_ids, own, count, normalize):
    """Columns with the largest logits of each row, (N, count), and which of them may be there at all."""
    x, y = unit_rows(query, normalize), unit_rows(columns, normalize)
    found = []
    for rows in torch.arange(len(x), device=x.device).split(max(1, LOGITS_PER_BLOCK // len(y))):
        with torch.autocast(x.device.type, enabled=False):
            logits = scale * (x[rows] @ y.T)  # (block, M)
        if bias is not None:
            logits += bias
        if row_ids is not None:
            logits.masked_fill_(row_ids[rows, None] == column_ids, -torch.inf)
        if own is not None:
            logits[torch.arange(len(rows), device=x.device), rows] = -torch.inf
        found.append(logits.topk(count, 1))
    largest = torch.cat([each.values for each in found])
    return torch.cat([each.indices for each in found]), largest != -torch.inf


def _checked_ids(query, candidates, item_ids, candidate_ids):
    if candidates is None:
        if candidate_ids is not None:
            raise ValueError(f"{OP}: candidate_ids must be None without candidates")
    elif (item_ids is None) != (candidate_ids is None):
        given, missing = (
            ("item_ids", "candidate_ids") if candidate_ids is None else ("candidate_ids", "item_ids")
        )
        raise ValueError(f"{OP}: {missing} must be given with {given} and candidates, got None")
    if item_ids is not None:
        item_ids = as_ids(OP, "item_ids", item_ids, (query.shape[0],), query)
    if candidate_ids is not None:
        candidate_ids = as_ids(OP, "candidate_ids", candidate_ids, (candidates.shape[0],), query)
    return item_ids, candidate_ids


def _checked_bias(query, columns, log_q, candidate_weights):
    """log w − log Q of each column in the accumulation dtype, or None."""
    for name, value in (("log_q", log_q), ("candidate_weights", candidate_weights)):
        if value is None:
            continue
        check_shape(OP, name, value, (columns,), query)
        check_floating(OP, name, value)
    if candidate_weights is not None and values_are_readable(candidate_weights):
        bad = candidate_weights[candidate_weights < 0]
        if len(bad):
            raise ValueError(f"{OP}: candidate_weights must be >= 0, got {bad[0].item()}")
    acc = accumulation_dtype(query)
    bias = None if candidate_weights is None else savable(candidate_weights.to(acc)).log()
    if log_q is None:
        return bias
    log_q = savable(log_q.to(acc))
    return -log_q if bias is None else bias - log_q


class SampledSoftmaxLoss(Loss):
    """`ssl_kernels.sampled_softmax_loss` as a module: `SampledSoftmaxLoss(temperature=0.1)(query, item, candidates)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        in_batch, num_hard_negatives, normalize, reduction, backend: As in `sampled_softmax_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 1.0,
        *,
        in_batch: bool = True,
        num_hard_negatives: int | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        query: torch.Tensor,
        item: torch.Tensor,
        candidates: torch.Tensor | None = None,
        *,
        item_ids: torch.Tensor | None = None,
        candidate_ids: torch.Tensor | None = None,
        log_q: torch.Tensor | None = None,
        candidate_weights: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return sampled_softmax_loss(
            query,
            item,
            candidates,
            item_ids=item_ids,
            candidate_ids=candidate_ids,
            log_q=log_q,
            candidate_weights=candidate_weights,
            row_weights=row_weights,
            **self.options,
        )
