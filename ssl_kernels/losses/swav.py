"""SwAV: each crop predicts the cluster codes of the others."""

from collections.abc import Sequence
from typing import Any

import torch

from ssl_kernels.backends import choose_backend
from ssl_kernels.checks import check_device, check_embeddings, check_reduction, check_scalar, is_whole
from ssl_kernels.losses._clusters import (
    Prototypes,
    Teacher,
    as_one_node,
    reduced,
    sample_weights,
    swapped_cross_entropy,
    views_of,
)
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import inverse, unit_rows, widest_under_autocast
from ssl_kernels.losses.sinkhorn import check_iterations, group_name
from ssl_kernels.ops.column_potentials import column_potentials
from ssl_kernels.ops.library import accumulation_dtype, refuse_torch_func
from ssl_kernels.reference.clustering import potentials
from ssl_kernels.reference.products import product

OP = "swav_loss"


def swav_loss(
    features: torch.Tensor | Sequence[torch.Tensor],
    prototypes: torch.Tensor,
    temperature: float | torch.Tensor = 0.1,
    *,
    epsilon: float | torch.Tensor = 0.05,
    iterations: int = 3,
    assign: Sequence[int] = (0, 1),
    queue: torch.Tensor | Sequence[torch.Tensor] | None = None,
    normalize: bool = True,
    normalize_prototypes: bool = True,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
    group: Any = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Swapped prediction: the cross-entropy of each crop's softmax over the prototypes against other crops' codes.

        loss_i = 1 / P · Σ_{a in assign} Σ_{v ≠ a} −Σ_k q_a,ik log softmax(<ẑ_v,i, ĉ> / temperature)_k

    with q_a the `sinkhorn` codes of crop a, without gradient, and P the number of pairs (a, v). Scores, softmax and
    codes are streamed: memory grows with V · N · D + K · D, and a block of 16 MB.

    Args:
        features: (V, N, D), or a sequence of V tensors (N, D): the crops of N images, V >= 2. float64, float32, float16
            or bfloat16, any strides.
        prototypes: (K, D), of the dtype of features; under autocast dtypes may differ, the widest one is used.
        temperature: > 0, a float or a tensor of one element, which gets its gradient.
        epsilon, iterations: As in `sinkhorn`.
        assign: Numbers of the crops whose codes are predicted; SwAV takes the two large ones.
        queue: Features of earlier batches that share the prototypes when codes are assigned, rows as they are: (Q, D)
            for all crops of `assign`, or a sequence of one such tensor for each of them. No gradient.
        normalize: L2-normalise the features first, as `F.normalize` does (eps 1e-12).
        normalize_prototypes: The same of the prototypes. SwAV normalises them in place after each step of the
            optimizer.
        reduction: "mean" over the N images, "sum", or "none".
        row_weights: (N,) floating, or None. "none" and "sum" take weight · loss, "mean" divides their sum by that of
            the weights.
        group: A process group whose ranks' images share the prototypes when codes are assigned, as in `sinkhorn`. The
            loss is that of this rank's images.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none".

    Raises:
        TypeError: Features or prototypes that are no floating tensors, or dtypes that differ outside autocast.
        ValueError: Shapes that do not fit, fewer than 2 crops, mixed devices, a temperature or epsilon not > 0, crops
            in `assign` that do not exist, an unknown reduction or backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Caron et al., SwAV, arXiv:2006.09882, eq. 2 and 6.
    """
    views = views_of(OP, "features", features)
    *views, prototypes = widest_under_autocast(*views, prototypes)
    check_embeddings(OP, features=views[0], prototypes=prototypes)
    if len(views) < 2:
        raise ValueError(f"{OP}: features must hold at least 2 crops, got {len(views)}")
    assign = _checked_crops(assign, len(views))
    queues = _checked_queues(queue, len(assign), prototypes)
    check_scalar(OP, "temperature", temperature, prototypes, positive=True)
    check_scalar(OP, "epsilon", epsilon, prototypes, positive=True)
    check_iterations(OP, iterations)
    check_reduction(OP, reduction, row_weights, views[0].shape[0], prototypes)
    name = group_name(OP, group)
    chosen = choose_backend("contrastive", backend, OP, views[0], prototypes)
    if chosen != "reference":
        refuse_torch_func(OP, chosen)
    weights = sample_weights(reduction, row_weights, views[0].shape[0], prototypes)
    scale, steepness = inverse(temperature, prototypes), inverse(epsilon, prototypes).detach()
    student = Prototypes(prototypes, scale, normalize, normalize_prototypes)
    pairs = [(k, v) for k, a in enumerate(assign) for v in range(len(views)) if v != a]
    if all(q is None for q in queues):
        is_whole = isinstance(features, torch.Tensor) and features.dtype == prototypes.dtype
        options = {"assign": assign, "iterations": iterations, "group": name, "steepness": steepness}
        loss = as_one_node(
            [features] if is_whole else views, student, pairs, weights, chosen=chosen, caller=OP, **options
        )
        if loss is not None:
            return reduced(loss, weights, prototypes, row_weights)
    acc = accumulation_dtype(prototypes)
    with torch.no_grad(), torch.autocast(prototypes.device.type, enabled=False):
        columns = unit_rows(prototypes.detach(), normalize_prototypes)
        rows = [steepness * unit_rows(views[a].detach(), normalize) for a in assign]
        biases = []
        for own, earlier in zip(rows, queues, strict=True):
            all_rows = own if earlier is None else torch.cat((own, steepness * earlier.detach().to(acc)))
            if chosen == "reference" and not name:
                biases.append(potentials(product(all_rows, columns.T), iterations))
            else:
                biases.append(column_potentials(all_rows, columns, iterations=iterations, group=name))
        teacher = Teacher(rows, columns, torch.stack(biases))
    loss = swapped_cross_entropy(
        views,
        student,
        teacher,
        pairs,
        weights,
        backend=backend,
        chosen=chosen,
        caller=OP,
    )
    return reduced(loss, weights, prototypes, row_weights)


swav_loss.operation = "contrastive"


def _checked_crops(assign, views):
    crops = tuple(assign) if isinstance(assign, (list, tuple, range)) else (assign,)
    for crop in crops:
        if not is_whole(crop) or not 0 <= crop < views:
            raise ValueError(f"{OP}: assign must hold crops from 0 to {views - 1}, got {crop!r}")
    if not crops or len(set(crops)) < len(crops):
        raise ValueError(f"{OP}: assign must hold different crops, at least one, got {crops}")
    return crops


def _checked_queues(queue, count, prototypes):
    """A queue or None for each crop whose codes are assigned."""
    if queue is None or isinstance(queue, torch.Tensor):
        queues = (queue,) * count
    else:
        queues = tuple(queue)
    if len(queues) != count:
        raise ValueError(f"{OP}: queue must hold {count} tensors as assign has crops, got {len(queues)}")
    width = prototypes.shape[1]
    for each in queues:
        if each is None:
            continue
        check_embeddings(OP, queue=each)
        if each.shape[1] != width:
            raise ValueError(f"{OP}: queue must have width {width} as features has, got {each.shape[1]}")
        check_device(OP, "queue", each, prototypes)
    return queues


class SwAVLoss(Loss):
    """`ssl_kernels.swav_loss` as a module: `SwAVLoss(temperature=0.1)(features, prototypes)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        epsilon, iterations, assign, normalize, normalize_prototypes, reduction, backend: As in `swav_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.1,
        *,
        epsilon: float | torch.Tensor = 0.05,
        iterations: int = 3,
        assign: Sequence[int] = (0, 1),
        normalize: bool = True,
        normalize_prototypes: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        features: torch.Tensor | Sequence[torch.Tensor],
        prototypes: torch.Tensor,
        *,
        queue: torch.Tensor | Sequence[torch.Tensor] | None = None,
        row_weights: torch.Tensor | None = None,
        group: Any = None,
    ) -> torch.Tensor:
        return swav_loss(
            features, prototypes, queue=queue, row_weights=row_weights, group=group, **self.options
        )
