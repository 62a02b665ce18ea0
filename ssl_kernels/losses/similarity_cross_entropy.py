"""Cross-entropy of similarities to any number of keys, with the arguments of `F.cross_entropy`."""

import torch

from ssl_kernels.checks import (
    check_floating,
    check_fraction,
    check_ids,
    check_reduction,
    check_scalar,
    check_shape,
    check_tensor,
    is_whole,
    shape_error,
    values_are_readable,
)
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._rows import row_dots
from ssl_kernels.losses._shared import (
    as_operand,
    as_scalar,
    checked_rows,
    native_row_losses,
    not_below_zero,
    number_operand,
    reduce,
    rows_for_several,
    takes_row_losses,
    unit_rows,
)
from ssl_kernels.losses._softmax import is_one_node, one_node
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import accumulation_dtype, savable

OP = "similarity_cross_entropy"


def similarity_cross_entropy(
    query: torch.Tensor,
    keys: torch.Tensor,
    target: torch.Tensor,
    scale: float | torch.Tensor = 1.0,
    *,
    target_weights: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    column_bias: torch.Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """`F.cross_entropy(scale · q̂ k̂ᵀ + column_bias, target)`, without the N × M matrix of similarities.

        loss_i = −Σ_p v_ip w_{t(i,p)} log softmax(z_i)_{t(i,p)},  z_ij = scale · <q̂_i, k̂_j> + column_bias_j

    with the targets t of row i, their shares v and the weights w of columns, 1 unless given. Any key may be the target
    of any number of queries, and there may be more keys than queries: positives first and hard negatives below them.

    Args:
        query: (N, D), float64, float32, float16 or bfloat16, any strides.
        keys: (M, D), dtype and device of query. Under autocast they may differ in dtype; the wider one is used.
        target: (N,) integers in [0, M), the column of each row, or (N, P): several of them. `ignore_index` stands for
            none: the row counts nothing, or in (N, P) has one target fewer.
        scale: 1 / temperature, a finite float or a tensor of one element, which gets its gradient.
        target_weights: (N, P) floating, the shares v of several targets, taken as they are; without it the targets of a
            row share 1 equally. Only with targets of two dimensions.
        weight: (M,) floating, the weights w of columns as targets, or None.
        ignore_index: An integer.
        label_smoothing: ε in [0, 1]: the target becomes (1 − ε) of itself and ε / M of each column.
        column_bias: (M,) floating, or None. Gets its gradient; −inf leaves a column out, as padding. A row whose
            columns are all left out has loss 0.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12).
        reduction: "mean", "sum" or "none". As in `F.cross_entropy`, "mean" of targets (N,) divides by the sum of
            the weights of the targets that count, and is NaN if none does; of targets (N, P) by the number of
            rows that have a target.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none".

    Raises:
        TypeError: An argument is no tensor or number of the kind above, or dtypes differ outside autocast.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, a target outside [0, M) (looked at where that
            waits for no device), scale not finite, label_smoothing outside [0, 1], an unknown reduction or
            backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: torch.nn.functional.cross_entropy.
    """
    query, keys = checked_rows(OP, 1, query=query, keys=keys)
    check_scalar(OP, "scale", scale, query)
    check_fraction(OP, "label_smoothing", label_smoothing)
    check_reduction(OP, reduction)
    columns = keys.shape[0]
    index, counts = _checked_target(query, columns, target, ignore_index)
    weight = _checked_columns("weight", weight, columns, query)
    column_bias = _checked_columns("column_bias", column_bias, columns, query)
    several = index.dim() == 2
    weigh_alike = weight is None and target_weights is None and _all_count(counts)
    if weigh_alike and not (several or label_smoothing):
        if is_one_node(backend, OP, reduction, None, query, keys, index, scale, column_bias):
            more = {"column_bias": column_bias, "normalize": normalize, "reduction": reduction}
            return one_node(query, keys, as_operand(scale, query), positives=index, **more)[0]
    if counts is None:
        counts = torch.ones_like(index, dtype=torch.bool)
    shares = _checked_shares(query, index, counts, target_weights)
    if label_smoothing:
        query, keys = (rows_for_several(rows, backend, OP) for rows in (query, keys))

    scale = as_scalar(scale, query)
    additions = {} if column_bias is None else {"column_bias": column_bias}
    lse, _, logits = contrastive(
        query,
        keys,
        scale,
        positives=index,
        normalize_rows=normalize,
        normalize_columns=normalize,
        equal_weights=weigh_alike and reduction != "none",
        backend=backend,
        caller=OP,
        **additions,
    )
    terms = (lse, logits) if column_bias is None else (lse, logits, column_bias[index])
    if weigh_alike and not (several or label_smoothing) and takes_row_losses(backend, OP, query, *terms):
        return native_row_losses("softmax", terms, reduction, query)
    if column_bias is not None:
        logits = logits + column_bias.double()[index]
    empty = lse == -torch.inf  # rows whose columns are all left out
    left_out = empty[:, None] if several else empty
    lse = lse.masked_fill(empty, 0)
    losses = not_below_zero((lse[:, None] if several else lse) - logits)
    losses = losses.masked_fill(left_out | ~counts, 0)  # first, since 0 · inf is NaN
    coefficients = shares if weight is None else shares * weight[index]
    loss = losses * coefficients
    if several:
        loss = loss.sum(1)
    any_target = counts.any(1) if several else counts
    if label_smoothing:
        smooth = _mean_loss_of_columns(lse, query, keys, scale, weight, column_bias, normalize)
        smooth = not_below_zero(smooth).masked_fill(empty | ~any_target, 0)
        loss = (1 - number_operand(label_smoothing, query)) * loss + label_smoothing * smooth
    if reduction == "mean":
        total = any_target.sum() if several else coefficients.sum()
        return (loss.sum() / total).to(accumulation_dtype(query))
    return reduce(loss, reduction, query)


similarity_cross_entropy.operation = "contrastive"


def _all_count(counts):
    """Whether every row has a target that counts. False where looking at the targets would wait."""
    if counts is None:
        return True
    return values_are_readable(counts) and bool((counts.any(1) if counts.dim() == 2 else counts).all())


def _mean_loss_of_columns(lse, query, keys, scale, weight, column_bias, normalize):
    """1 / M · Σ_j w_j (lse_i − z_ij), in O((N + M) · D): the keys are added up first."""
    rows, columns = unit_rows(query, normalize), unit_rows(keys, normalize)
    if weight is None:
        loss = lse - scale * row_dots(rows, columns.mean(0))
        return loss if column_bias is None else loss - column_bias.double().mean()
    share = weight / columns.shape[0]
    mean = (share.to(columns.dtype)[:, None] * columns).sum(0)  # no product, which autocast would round
    loss = share.sum() * lse - scale * row_dots(rows, mean)
    return loss if column_bias is None else loss - (share * column_bias).sum()


def _checked_target(query, columns, target, ignore_index):
    """Column of each target, 0 where there is none, and which there are or None for all; (N,) or (N, P)."""
    check_tensor(OP, "target", target)
    n = query.shape[0]
    several = target.dim() == 2 and target.shape[1] > 0
    if (not several and target.dim() != 1) or target.shape[0] != n:
        raise shape_error(OP, "target", f"({n},) or ({n}, P)", target)
    check_ids(OP, "target", target, target.shape, query)
    if not is_whole(ignore_index):
        raise TypeError(f"{OP}: ignore_index must be an integer, got {type(ignore_index).__name__}")
    target = target.long()
    readable = values_are_readable(target)
    if readable and not 0 <= ignore_index < columns:
        least, most = target.aminmax()
        if least.item() >= 0 and most.item() < columns:
            return target.clone(), None
    counts = target != ignore_index
    if readable:
        bad = target[counts & ((target < 0) | (target >= columns))]
        if len(bad):
            raise ValueError(
                f"{OP}: target must be in [0, {columns}) or be ignore_index {ignore_index}, got {bad[0].item()}"
            )
    return target.masked_fill(~counts, 0), counts


def _checked_shares(query, index, counts, target_weights):
    """Of each target, float64; 0 where there is none."""
    if target_weights is None:
        shares = counts.double()
        return shares / shares.sum(1, keepdim=True).clamp_min(1) if index.dim() == 2 else shares
    if index.dim() == 1:
        raise ValueError(f"{OP}: target_weights must be None with a target of shape {tuple(index.shape)}")
    check_shape(OP, "target_weights", target_weights, index.shape, query)
    check_floating(OP, "target_weights", target_weights)
    return savable(target_weights.double()).masked_fill(~counts, 0)


def _checked_columns(name, value, columns, query):
    """A floating number per column: `weight` as float64, `column_bias` in the accumulation dtype; or None."""
    if value is None:
        return None
    check_shape(OP, name, value, (columns,), query)
    check_floating(OP, name, value)
    return savable(value.to(torch.float64 if name == "weight" else accumulation_dtype(query)))


class SimilarityCrossEntropyLoss(Loss):
    """`ssl_kernels.similarity_cross_entropy` as a module: `SimilarityCrossEntropyLoss(20.0)(query, keys, target)`.

    Args:
        scale: A float, a tensor of one element, or an `nn.Parameter` to learn it.
        weight: None or (M,), a weight per column as target; a buffer.
        ignore_index, label_smoothing, normalize, reduction, backend: As in `similarity_cross_entropy`.
    """

    def __init__(
        self,
        scale: float | torch.Tensor = 1.0,
        *,
        weight: torch.Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        target: torch.Tensor,
        *,
        target_weights: torch.Tensor | None = None,
        column_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return similarity_cross_entropy(
            query, keys, target, target_weights=target_weights, column_bias=column_bias, **self.options
        )
