"""SupCon: all rows of a label attract each other."""

import torch

from ssl_kernels import backends
from ssl_kernels.checks import (
    check_embeddings,
    check_reduction,
    check_scalar,
    check_shape,
    short,
    values_are_readable,
)
from ssl_kernels.losses._labels import as_ids, bit_sets, check_unlabelled, ranks, without_unlabelled
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._rows import Groups, less_class_means
from ssl_kernels.losses._shared import inverse, inverse_operand, not_below_zero, reduce, weighted_mean
from ssl_kernels.losses._softmax import is_one_node, one_node
from ssl_kernels.ops.class_contrastive import class_contrastive, takes_classes
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import accumulation_dtype
from ssl_kernels.warning import warn

OP = "sup_con_loss"


def sup_con_loss(
    features: torch.Tensor,
    labels: torch.Tensor | None,
    temperature: float | torch.Tensor = 0.07,
    *,
    positives: torch.Tensor | None = None,
    unlabelled: int | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Supervised contrastive loss: each row against all others, those of its own label being the positives P(i).

        loss_i = −1/|P(i)| Σ_{p in P(i)} log( exp(s_ip) / Σ_{j ≠ i} exp(s_ij) ),  s_ij = <z_i, z_j> / temperature

    The form with the sum outside of the logarithm (L_out). Several views of a sample are rows of one label:
    `sup_con_loss(torch.cat((z0, z1)), labels.repeat(2))`. A row is never its own positive.

    Args:
        features: (N, D), float64, float32, float16 or bfloat16, any strides.
        labels: Integers of any dtype, or bool. (N,) or (N, 1): rows of equal labels are positives of each other.
            (N, C) with C > 1, of 0 and 1: several labels per row. P(i) are the rows that share at least one with i.
            The CPU looks whether they are 0 or 1, outside of torch.compile; elsewhere what is not 0 counts as 1. None
            with `positives`.
        temperature: > 0, a float or a tensor of one element, which gets its gradient.
        positives: (N, N) bool or integers instead of labels: P(i) are the rows j with positives[i, j]. It need not be
            symmetric; its diagonal is not read. Labels need no such matrix.
        unlabelled: The label of rows without one, as −1, or None. They are negatives of all others, have no positive
            and are nobody's. With several labels per row, such a row has 0 everywhere.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12).
        reduction: "mean" over the rows that have a positive, "sum", or "none". A row without a positive (the only
            one of its label) has loss 0 and counts nothing in the mean; as a negative of the others it stays.
            Where no row has one, all are 0, and on the CPU outside of torch.compile a warning says so: elsewhere
            that would have to wait for the device.
        row_weights: (N,) floating, or None. "none" and "sum" take weight · loss, "mean" divides their sum by that of
            the weights of rows with a positive; it is 0 where that is 0.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`). On a GPU,
            "native" and "triton" take one label per row, and None picks "chunked" for the rest.

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none".

    Raises:
        TypeError: features is no floating tensor, labels or positives none of integers or bool, unlabelled no integer.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, temperature not > 0, both or neither of
            labels and positives, unlabelled without one label per row, an unknown reduction or backend, or a backend
            that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Khosla et al., arXiv:2004.11362, eq. 2.
    """
    return _sup_con_loss(
        features,
        labels,
        temperature,
        positives=positives,
        unlabelled=unlabelled,
        normalize=normalize,
        reduction=reduction,
        row_weights=row_weights,
        backend=backend,
    )


sup_con_loss.operation = "contrastive"


def sup_con_sum(views, labels, temperature, divisor, *, positives=None, normalize):
    """The losses of `sup_con_loss` over all views, added up and divided by a number.

    Args:
        views: (B, V, D), none of them 0.
        labels: (B · V,) int64; None with positives.
        temperature: As `sup_con_loss` takes it, and checked.
    """
    if positives is None and is_one_node(None, OP, "sum", None, views, labels, temperature):
        scale = inverse_operand(temperature, views)
        return _class_node(views, labels, scale, normalize, "sum", divisor)
    options = {"normalize": normalize, "reduction": "sum", "divisor": divisor}
    return _sup_con_loss(views.flatten(0, 1), labels, temperature, positives=positives, **options)


def _sup_con_loss(
    features,
    labels,
    temperature,
    *,
    positives,
    unlabelled=None,
    normalize,
    reduction,
    row_weights=None,
    backend=None,
    divisor=None,
):
    """`sup_con_loss`; a divisor goes with the reduction "sum"."""
    check_embeddings(OP, features=features)
    positives = _positives(features, labels, positives, unlabelled)
    check_scalar(OP, "temperature", temperature, features, positive=True)
    check_reduction(OP, reduction, row_weights, features.shape[0], features)
    chosen = backends.choose_backend("contrastive", backend, OP, features)
    look = values_are_readable(features)
    if (
        look
        and chosen == "native"
        and reduction != "none"
        and row_weights is None
        and values_are_readable(positives)
    ):
        scale = inverse_operand(temperature, features)
        return _class_node(features, positives, scale, normalize, reduction, divisor)
    scale = inverse(temperature, features)
    if not takes_classes(chosen, features) and positives.dim() > 1:
        if backend is not None:
            raise ValueError(
                f'{OP}: backend "{backend}" cannot run this call: on a GPU it takes one label per row'
            )
        chosen = "chunked"
    if takes_classes(chosen, features):
        loss, counts = class_contrastive(features, scale, positives, normalize=normalize, backend=chosen)
    else:
        loss, counts = _by_class_sums(features, scale, positives, normalize, chosen)

    if look and counts.min().item() > 0:
        return _over(divisor, reduce(loss, reduction, features, row_weights))
    has_positive = counts > 0
    if look and not has_positive.any():
        _warn_of_no_positive()
    if reduction != "mean":
        return _over(divisor, reduce(loss, reduction, features, row_weights))
    counted = has_positive.to(loss.dtype)
    if row_weights is not None:
        counted = counted * row_weights
    return weighted_mean(loss, counted).to(accumulation_dtype(features))


def _class_node(features, classes, scale, normalize, reduction, divisor):
    loss, counted = one_node(
        features,
        None,
        scale,
        classes=classes,
        normalize=normalize,
        reduction=reduction,
        divisor=divisor,
    )
    if counted == 0:
        _warn_of_no_positive()
    return loss


def _over(divisor, loss):
    return loss if divisor is None else loss / divisor


def _warn_of_no_positive():
    warn(f"{OP}: no row has another of its label, so the loss is 0")


def _positives(features, labels, positives, unlabelled):
    """Which rows are whose positives, as `class_contrastive` takes it."""
    marks = checked_marks(features, labels, positives, unlabelled, features.shape[0])
    return marks if unlabelled is None else without_unlabelled(marks, unlabelled)


def checked_marks(features, labels, positives, unlabelled, columns):
    """(n,) int64 labels, (n, W) int64 bit sets of several labels per row, or (n, columns) bool."""
    n = features.shape[0]
    if positives is not None:
        if labels is not None or unlabelled is not None:
            given = "labels" if labels is not None else "unlabelled"
            raise ValueError(f"{OP}: {given} must be None with positives")
        check_shape(OP, "positives", positives, (n, columns), features)
        if positives.is_floating_point() or positives.is_complex():
            raise TypeError(f"{OP}: positives must be bool or integers, got {short(positives.dtype)}")
        return positives != 0
    if labels is None:
        raise ValueError(f"{OP}: labels must be given without positives, got None")
    if isinstance(labels, torch.Tensor) and labels.dim() == 2 and labels.shape[1] > 1:
        check_shape(OP, "labels", labels, (n, labels.shape[1]), features)
        if unlabelled is not None:
            raise ValueError(f"{OP}: unlabelled must be None with several labels per row, got {unlabelled!r}")
        return bit_sets(OP, "labels", labels)
    check_unlabelled(OP, unlabelled)
    return as_ids(OP, "labels", labels, (n,), features)


def _by_class_sums(features, scale, labels, normalize, backend):
    """(losses, counts) by kernels of `contrastive`, which know no classes: Σ_p s_ip = scale · <z_i, C − z_i>.

    C is the sum of the rows of i's label, O(N · D). The rows are in float32 whatever the features: where a row has
    learned its class, the gradients of lse and positives nearly cancel.
    """
    rows = features.to(accumulation_dtype(features))
    lse = contrastive(rows, None, scale, normalize_rows=normalize, backend=backend, caller=OP).lse
    groups, members = _groups(labels)
    counts = (members.index_select(0, groups.group) - 1).double()
    inverse_count = counts.reciprocal().where(counts > 0, 0)
    loss = less_class_means(lse, scale, rows, groups, inverse_count, normalize, backend)
    return not_below_zero(loss).where(counts > 0, 0), counts


def _groups(labels):
    """`Groups` of equal labels, and how many rows each has, int64, without waiting for a GPU as torch.unique would."""
    ordered, order = labels.sort(stable=True)
    rank = ranks(ordered)
    count = torch.zeros_like(order).scatter_add_(0, rank, torch.ones_like(order))
    group = torch.empty_like(order).scatter_(0, order, rank)
    return Groups(group, order, count.cumsum(0) - count), count


class SupConLoss(Loss):
    """`ssl_kernels.sup_con_loss` as a module: `SupConLoss(temperature=0.07)(features, labels)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        unlabelled, normalize, reduction, backend: As in `sup_con_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.07,
        *,
        unlabelled: int | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        features: torch.Tensor,
        labels: torch.Tensor | None,
        *,
        positives: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return sup_con_loss(features, labels, positives=positives, row_weights=row_weights, **self.options)
