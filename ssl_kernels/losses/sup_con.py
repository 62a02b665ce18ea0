"""SupCon: all rows of a label attract each other."""

import warnings

import torch

from ssl_kernels.backends import choose_backend
from ssl_kernels.checks import (
    can_be_read,
    check_embeddings,
    check_ids,
    check_reduction,
    check_row_weights,
    check_scalar,
)
from ssl_kernels.losses._rows import Groups, less_class_means
from ssl_kernels.losses._shared import inverse, reduce
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import accumulation_dtype

OP = "sup_con_loss"


def sup_con_loss(
    features,
    labels,
    temperature=0.07,
    *,
    normalize=True,
    reduction="mean",
    row_weights=None,
    backend=None,
):
    """Supervised contrastive loss: each row against all others, those of its own label being the positives P(i).

        loss_i = −1/|P(i)| Σ_{p in P(i)} log( exp(s_ip) / Σ_{j ≠ i} exp(s_ij) ),  s_ij = <z_i, z_j> / temperature

    The form with the sum outside of the logarithm (L_out). Several views of a sample are rows of one label:
    `sup_con_loss(torch.cat((z0, z1)), labels.repeat(2))`.

    The positives cost O(N · D): Σ_p s_ip = <z_i, C − z_i> / temperature with C the sum of the rows of i's label.

    Args:
        features: (N, D), float64, float32, float16 or bfloat16, any strides.
        labels: (N,) integers, any values.
        temperature: > 0, a float or a tensor of one element, which gets its gradient.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12).
        reduction: "mean" over the rows that have a positive, "sum", or "none". A row without a positive (the only
            one of its label) has loss 0 and counts nothing in the mean; as a negative of the others it stays.
            Where no row has one, all are 0, and on the CPU outside of torch.compile a warning says so: elsewhere
            that would have to wait for the device.
        row_weights: (N,) floating, or None. "none" and "sum" take weight · loss, "mean" divides their sum by that of
            the weights of rows with a positive.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none".

    Raises:
        TypeError: features is no floating or labels no integer tensor.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, temperature not > 0, an unknown reduction
            or backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Khosla et al., arXiv:2004.11362, eq. 2.
    """
    check_embeddings(OP, features=features)
    check_ids(OP, "labels", labels, (features.shape[0],), features)
    check_scalar(OP, "temperature", temperature, features, positive=True)
    check_reduction(OP, reduction)
    check_row_weights(OP, "row_weights", row_weights, features.shape[0], features)

    look = can_be_read(labels)
    groups, members = _groups(labels, look)
    everywhere = look and int(members.min()) > 1
    positives = members.index_select(0, groups.group) - 1
    has_positive = None if everywhere else positives > 0
    if look and not everywhere and not has_positive.any():
        warnings.warn(f"{OP}: no row has another of its label, so the loss is 0", stacklevel=2)

    scale = inverse(temperature, features)
    lse = contrastive(features, None, scale, normalize_rows=normalize, backend=backend, caller=OP).lse
    inverse_count = positives.double().reciprocal_()
    if not everywhere:
        inverse_count = inverse_count.where(has_positive, 0)
    even = reduction != "none" and row_weights is None
    chosen = choose_backend("contrastive", backend, OP, features)
    loss = less_class_means(lse, scale, features, groups, inverse_count, normalize, even, chosen)
    if everywhere:
        return reduce(loss, reduction, features, row_weights)
    loss = loss.where(has_positive, 0)
    if reduction != "mean":
        return reduce(loss, reduction, features, row_weights)
    counted = has_positive.to(loss.dtype)
    if row_weights is not None:
        counted = counted * row_weights
    total = counted.sum()
    return ((loss * counted).sum() / total.where(has_positive.any(), 1)).to(accumulation_dtype(features))


sup_con_loss.operation = "contrastive"


def _groups(labels, look):
    """`Groups` of equal labels, and how many rows each has, int64.

    torch.unique's number of results makes the CPU wait for a GPU and breaks torch.compile's graph: only with `look`.
    """
    ordered, order = labels.sort(stable=True)
    if look:
        _, rank, count = torch.unique_consecutive(ordered, return_inverse=True, return_counts=True)
    else:
        begins = (ordered != ordered.roll(1)).long()  # the first may, or may not: what it counts is taken off
        rank = begins.cumsum(0) - begins[0]
        count = torch.zeros_like(order).scatter_add_(0, rank, torch.ones_like(order))
    group = torch.empty_like(order).scatter_(0, order, rank)
    return Groups(group, order, count.cumsum(0) - count), count
