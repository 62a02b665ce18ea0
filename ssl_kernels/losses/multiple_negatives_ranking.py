"""Multiple negatives ranking loss of sentence-transformers: InfoNCE in up to four directions, with hard negatives."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from ssl_kernels.checks import check_choice, check_reduction, check_same_rows, check_scalar, is_number
from ssl_kernels.losses._labels import as_ids
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import (
    as_operand,
    as_scalar,
    checked_rows,
    infinite_as_nan,
    native_row_losses,
    number_operand,
    reduce,
    rows_for_several,
    stacked,
    takes_row_losses,
)
from ssl_kernels.losses._softmax import is_one_node, one_node, pairs_loss
from ssl_kernels.memory import kept_at_most
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.row_pairs import row_pairs

OP = "multiple_negatives_ranking_loss"
DIRECTIONS = ("query_to_doc", "doc_to_query", "query_to_query", "doc_to_doc")
PARTITION_MODES = ("joint", "per_direction")
HARDNESS_MODES = ("in_batch_negatives", "hard_negatives", "all_negatives")
MARGIN_MODES = ("absolute", "relative")
# Of the logits with hard negatives, beside what the square pass of all directions keeps for backward.
KEPT_BYTES = 12 << 20


def multiple_negatives_ranking_loss(
    anchor: torch.Tensor,
    positive: torch.Tensor,
    *hard_negatives: torch.Tensor,
    scale: float | torch.Tensor = 20.0,
    directions: Sequence[str] = ("query_to_doc",),
    partition_mode: str = "joint",
    hardness_mode: str | None = None,
    hardness_strength: float = 0.0,
    margin: float | None = None,
    margin_mode: str = "absolute",
    ids: torch.Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """MultipleNegativesRankingLoss of sentence-transformers: each query against its document and all others.

        loss_i = log Σ exp(the logits of every direction) − s(q_i, d_i),  s = scale · cosine

    with, of each direction, these logits of row i:

    - "query_to_doc": q_i with every document, all positives and all hard negatives, its own too;
    - "doc_to_query": d_i with every query;
    - "query_to_query": q_i with every other query;
    - "doc_to_doc": d_i with every document of the other queries.

    "joint" adds up the exponentials of all of them, so that with "doc_to_query" the own pair is in the sum twice;
    "per_direction" is the mean of a loss for each direction. All four at once are one pass over the square of the
    rows [queries; documents].

    Args:
        anchor, positive: Queries q and their documents d, (N, D) each. float64, float32, float16 or bfloat16, any
            strides. Under autocast they may differ in dtype; the widest is used. All embeddings get their gradient.
        *hard_negatives: Further documents, (K, D) each. Row i of each is query i's where a query's own documents
            matter: with "doc_to_doc", a hardness mode or ids, and K is N then.
        scale: 1 / temperature, > 0, a float or a tensor of one element, which gets its gradient.
        directions: Some of the four above, "query_to_doc" among them; order and repeats do not matter.
        partition_mode: "joint" or "per_direction"; the latter for "query_to_doc" and "doc_to_query" alone.
        hardness_mode: None, or which logits of "query_to_doc" are raised by hardness_strength · cosine, a constant to
            the gradient: "in_batch_negatives", documents of the other queries; "hard_negatives", the query's own hard
            negatives; "all_negatives", both. Never the own positive.
        hardness_strength: >= 0, not multiplied by scale.
        margin: A number, or None. Likely false negatives are left out of row i: with "absolute" what has a cosine above
            cosine(q_i, d_i) − margin, with "relative" above (1 − margin) · cosine(q_i, d_i). It may be negative: Qwen3
            leaves out what is above the positive by 0.1, `margin=-0.1`; NV-Retriever what is above 95 % of
            it, 0.05 and "relative". Positives stay in, and so do hard negatives, which are curated. No gradient goes
            through the choice.
        margin_mode: "absolute" or "relative".
        ids: (N,) or (N, 1) integers or bool, or None. Queries of equal ids are duplicates: the query and the
            documents of one are no negatives of the other.
        normalize: L2-normalise the rows first: cosines. False takes inner products, `dot_score`.
        reduction: "mean" over the N queries, "sum", or "none".
        row_weights: (N,) floating, or None. "none" and "sum" take weight · loss, "mean" divides their sum by that of
            the weights.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none".

    Raises:
        TypeError: An argument is no tensor or number of the kind above, or dtypes differ outside autocast.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, scale not > 0, unknown or missing directions,
            a mode that is none of the above, hardness_strength < 0, an unknown reduction or backend, or a backend
            that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: sentence-transformers 6.2, MultipleNegativesRankingLoss; Henderson et al., arXiv:1705.00652; Li et al.,
    GTE, arXiv:2308.03281, eq. 3 (all directions); Moreira et al., NV-Retriever, arXiv:2407.15831, section 3 (margins).
    """
    names = {f"hard_negatives[{k}]": rows for k, rows in enumerate(hard_negatives)}
    anchor, positive, *hard_negatives = checked_rows(OP, 2, anchor=anchor, positive=positive, **names)
    names = dict(zip(names, hard_negatives, strict=True))
    check_scalar(OP, "scale", scale, anchor)
    check_scalar(OP, "scale", scale, anchor, positive=True)
    n = anchor.shape[0]
    check_reduction(OP, reduction, row_weights, n, anchor)
    directions = _checked_directions(directions, partition_mode)
    hardness = _checked_hardness(hardness_mode, hardness_strength)
    _check_margin(margin, margin_mode)
    own = torch.arange(n, device=anchor.device)
    groups = own if ids is None else as_ids(OP, "ids", ids, (n,), anchor)
    if "doc_to_doc" in directions or hardness or ids is not None:
        check_same_rows(OP, anchor=anchor, **names)
    apart = hardness is not None or ids is not None  # own pairs are added to the sums by themselves
    both = len(directions) == 2 and partition_mode == "per_direction"
    if not apart and margin is None and (len(directions) == 1 or (both and not hard_negatives)):
        options = {"both_directions": both, "normalize": normalize, "backend": backend, "caller": OP}
        documents = _joined([positive, *hard_negatives])
        return pairs_loss(anchor, documents, as_operand(scale, anchor), reduction, row_weights, **options)
    square = partition_mode == "joint" and len(directions) == 4 and not hardness
    if square and not (apart or hard_negatives) and margin is None:
        if is_one_node(backend, OP, reduction, row_weights, anchor, positive, scale, views=2):
            options = {"are_views": True, "joint": True, "normalize": normalize, "reduction": reduction}
            return one_node(anchor, positive, as_operand(scale, anchor), **options)[0]
    scale = as_scalar(scale, anchor)
    if apart or margin is not None or (len(directions) > 1 and not (square and not hard_negatives)):
        anchor, positive, *hard_negatives = (
            rows_for_several(rows, backend, OP) for rows in (anchor, positive, *hard_negatives)
        )
    call = _Call(anchor, positive, hard_negatives, scale, groups, ids is not None, normalize, backend)
    call.equal_weights = len(directions) == 1 and not apart and row_weights is None and reduction != "none"
    if margin is not None:
        call.limit_by(margin, margin_mode)
    if square:
        log_z, logit = call.all_directions()
    else:
        terms, logit = call.each_direction(directions, *(hardness or (None, 0.0)))
        if len(terms) == 1:
            log_z = terms[0]
        elif partition_mode == "joint":
            log_z = torch.stack(terms).logsumexp(0)
        else:
            log_z = sum(terms) / len(terms)
    if apart:
        log_z = infinite_as_nan(log_z)
    elif takes_row_losses(backend, OP, anchor, log_z, logit):
        return native_row_losses("softmax", (log_z, logit), reduction, anchor, row_weights)
    return reduce(log_z - logit, reduction, anchor, row_weights)


multiple_negatives_ranking_loss.operation = "contrastive"


class _Call:
    """The log-sum-exps of one call."""

    def __init__(self, queries, positives, hard_negatives, scale, groups, has_ids, normalize, backend):
        self.queries, self.positives, self.hard_negatives = queries, positives, hard_negatives
        self.scale, self.groups, self.has_ids = scale, groups, has_ids
        self.own = torch.arange(queries.shape[0], device=queries.device)
        self.normalize, self.backend = normalize, backend
        self.equal_weights = False  # whether each query's sum of documents gets the same gradient
        self.documents = None  # all positives and hard negatives, where they are the columns of one sum
        self.limit = self.curated = None  # of cosines, per row; which documents are left out by none

    def limit_by(self, margin, mode):
        with torch.no_grad():
            cosine = self.cosine(self.queries.detach(), self.positives.detach())
            self.limit = (
                cosine - margin if mode == "absolute" else cosine * (1 - number_operand(margin, cosine))
            )
        count = sum(rows.shape[0] for rows in (self.positives, *self.hard_negatives))
        self.curated = torch.arange(count, device=self.queries.device) >= self.own.shape[0]

    def cosine(self, x, y):
        """<x_i, y_i> of each row, (N,) float64."""
        return row_pairs(x, y, normalize=self.normalize, measure="product", backend=self.backend, caller=OP)

    def limits(self, scale, exempt=None):
        """Arguments that leave out likely false negatives of rows that are queries, or their documents."""
        if self.limit is None:
            return {}
        return {"row_limit": (scale.detach() * self.limit).to(scale.dtype), "exempt": exempt}

    def contrastive(self, rows, columns, scale, **options):
        return contrastive(
            rows,
            columns,
            scale,
            normalize_rows=self.normalize,
            normalize_columns=self.normalize,
            backend=self.backend,
            caller=OP,
            **options,
        )

    def all_directions(self):
        """Over the rows [queries; positives], none with itself, and over the hard negatives as their columns."""
        n, kinds = self.own.shape[0], len(self.hard_negatives)
        rows = stacked(self.queries, self.positives)
        ids = {"row_ids": self.groups.repeat(2)} if self.has_ids else {}  # all own pairs are left out
        limits = self.limits(self.scale)
        if limits:
            limits["row_limit"] = limits["row_limit"].repeat(2)
        partner = torch.cat((self.own + n, self.own))
        lse, _, logit = self.contrastive(rows, None, self.scale, positives=partner, **limits, **ids)
        terms, logit = [lse[:n], lse[n:]], logit[:n]
        if self.hard_negatives:
            # A query meets its own hard negatives, its positive does not.
            ids = {"row_ids": torch.cat((self.own - n, self.own)), "column_ids": self.own.repeat(kinds)}
            if self.has_ids:
                ids = {"row_ids": self.groups.repeat(2), "column_ids": self.groups.repeat(kinds)}
            with nullcontext() if torch.compiler.is_compiling() else kept_at_most(KEPT_BYTES):
                lse = self.contrastive(rows, _joined(self.hard_negatives), self.scale, **ids).lse
            terms += [lse[:n], lse[n:]]
        if self.has_ids:
            own = [self.scale * self.cosine(self.queries, rows) for rows in self.hard_negatives]
            terms += [logit, logit, *own]
        return torch.stack(terms).logsumexp(0), logit

    def each_direction(self, directions, hardness_mode, strength):
        """[log-sum-exp of each direction], the positive's logit; (N,) each."""
        scale, own, groups = self.scale, self.own, self.groups
        self.documents = _joined([self.positives, *self.hard_negatives])
        ids = {"row_ids": groups, "column_ids": groups} if self.has_ids else {}
        both = "doc_to_query" in directions and not self.hard_negatives and self.limit is None
        terms = {}
        if hardness_mode is None and not (self.has_ids and self.hard_negatives):
            options = (
                ids | {"positives": own, "keep_diagonal": self.has_ids} | self.limits(scale, self.curated)
            )
            options |= {"both_directions": both, "equal_weights": self.equal_weights}
            lse, doc_lse, logit = self.contrastive(self.queries, self.documents, scale, **options)
            terms["query_to_doc"] = lse
            if both:
                terms["doc_to_query"] = doc_lse
        else:
            terms["query_to_doc"], logit = self.raised(hardness_mode, strength)
        if "doc_to_query" in directions and "doc_to_query" not in terms:
            options = ids | {"positives": own, "keep_diagonal": self.has_ids} | self.limits(scale)
            terms["doc_to_query"] = self.contrastive(self.positives, self.queries, scale, **options).lse
        square = {"row_ids": groups} if self.has_ids else {}
        if "query_to_query" in directions:
            terms["query_to_query"] = self.contrastive(
                self.queries, None, scale, **square, **self.limits(scale)
            ).lse
        if "doc_to_doc" in directions and not self.hard_negatives:
            terms["doc_to_doc"] = self.contrastive(
                self.positives, None, scale, **square, **self.limits(scale)
            ).lse
        elif "doc_to_doc" in directions:
            terms["doc_to_doc"] = self.of_others(self.positives, scale)
        return list(terms.values()), logit

    def of_others(self, rows, scale):
        """Log-sum-exp of each row with the documents of the other queries."""
        column_ids = self.groups.repeat(1 + len(self.hard_negatives))
        limits = self.limits(scale, self.curated)
        return self.contrastive(
            rows, self.documents, scale, row_ids=self.groups, column_ids=column_ids, **limits
        ).lse

    def raised(self, mode, strength):
        """Log-sum-exp of each query with the documents, of which some are raised by a constant of their cosine."""
        scale = self.scale
        if mode in ("in_batch_negatives", "all_negatives"):
            # s + a cosine, with a gradient by s alone, is (scale + a) · cosine whose gradient by the rows is
            # scale / (scale + a) of its own, and by scale all of it.
            share = (scale / (scale + strength)).detach()
            steep = _with_gradient(scale + strength, 1 / share)
            others = _with_gradient(self.of_others(self.queries, steep), share)
        else:
            others = self.of_others(self.queries, scale)
        logit = scale * self.cosine(self.queries, self.positives)
        own = [logit]
        for rows in self.hard_negatives:
            cosine = self.cosine(self.queries, rows)
            raised = mode in ("hard_negatives", "all_negatives")
            own.append(scale * cosine + (strength * cosine.detach() if raised else 0))
        return torch.stack([others, *own]).logsumexp(0), logit


def _joined(rows):
    return stacked(*rows) if len(rows) > 1 else rows[0]


def _with_gradient(value, factor):
    """value, with `factor` times its gradient. −inf has none."""
    constant = value.detach()
    finite = constant.where(constant.isfinite(), 0)
    return constant + factor * (value.where(constant.isfinite(), 0) - finite)


def _checked_directions(directions, partition_mode):
    if isinstance(directions, str):
        raise ValueError(f"{OP}: directions must be a sequence of names, got {directions!r}")
    directions = tuple(directions)
    for direction in directions:
        if direction not in DIRECTIONS:
            raise ValueError(f"{OP}: directions must be of {', '.join(DIRECTIONS)}, got {direction!r}")
    if "query_to_doc" not in directions:
        raise ValueError(f'{OP}: directions must have "query_to_doc" among them, got {directions!r}')
    check_choice(OP, "partition_mode", partition_mode, *PARTITION_MODES)
    if partition_mode == "per_direction" and not {"query_to_doc", "doc_to_query"} >= set(directions):
        raise ValueError(
            f'{OP}: directions must be "query_to_doc" and "doc_to_query" alone with "per_direction",'
            f" got {directions!r}"
        )
    return [direction for direction in DIRECTIONS if direction in directions]


def _checked_hardness(mode, strength):
    """(mode, strength), or None where nothing is raised."""
    check_choice(OP, "hardness_mode", mode, *HARDNESS_MODES, None)
    if not is_number(strength):
        raise TypeError(f"{OP}: hardness_strength must be a number, got {type(strength).__name__}")
    if not 0 <= strength < torch.inf:
        raise ValueError(f"{OP}: hardness_strength must be finite and >= 0, got {strength}")
    return (mode, strength) if mode is not None and strength > 0 else None


def _check_margin(margin, mode):
    check_choice(OP, "margin_mode", mode, *MARGIN_MODES)
    if margin is None:
        return
    if not is_number(margin):
        raise TypeError(f"{OP}: margin must be a number or None, got {type(margin).__name__}")
    if not -torch.inf < margin < torch.inf:
        raise ValueError(f"{OP}: margin must be finite, got {margin}")


class MultipleNegativesRankingLoss(Loss):
    """`ssl_kernels.multiple_negatives_ranking_loss` as a module: `...(scale=20.0)(anchor, positive, *hard_negatives)`.

    Args:
        scale: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        directions, partition_mode, hardness_mode, hardness_strength: As in `multiple_negatives_ranking_loss`.
        margin, margin_mode, normalize, reduction, backend: Likewise.
    """

    def __init__(
        self,
        scale: float | torch.Tensor = 20.0,
        *,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
        margin: float | None = None,
        margin_mode: str = "absolute",
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        anchor: torch.Tensor,
        positive: torch.Tensor,
        *hard_negatives: torch.Tensor,
        ids: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return multiple_negatives_ranking_loss(
            anchor, positive, *hard_negatives, ids=ids, row_weights=row_weights, **self.options
        )
