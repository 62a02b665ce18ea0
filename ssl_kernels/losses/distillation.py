"""Distillation of a similarity matrix: the pupil's softmax over the keys is to be the teacher's."""

import torch

from ssl_kernels.backends import choose_backend
from ssl_kernels.checks import check_device, check_embeddings, check_reduction, check_same_rows, check_scalar
from ssl_kernels.losses._clusters import (
    Prototypes,
    Teacher,
    as_one_node,
    reduced,
    runs_in_blocks,
    sample_weights,
    swapped_cross_entropy,
)
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._rows import row_dots
from ssl_kernels.losses._shared import (
    checked_rows,
    inverse,
    not_below_zero,
    reduce,
    rows_for_several,
    unit_rows,
)
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import refuse_torch_func
from ssl_kernels.ops.teacher_dots import teacher_dots
from ssl_kernels.reference.products import product

OP = "distillation_loss"


def distillation_loss(
    query: torch.Tensor,
    keys: torch.Tensor,
    teacher_query: torch.Tensor,
    teacher_keys: torch.Tensor,
    temperature: float | torch.Tensor = 0.07,
    teacher_temperature: float | torch.Tensor | None = None,
    *,
    normalize: bool = True,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Kullback-Leibler divergence of the pupil's similarities to the keys from the teacher's, row by row.

        loss_i = Σ_j p_ij (log p_ij − log softmax(s_i)_j),  p_i = softmax(t_i)

    with s_ij = <q̂_i, k̂_j> / temperature of the pupil and t_ij of the teacher's own embeddings at its temperature. The
    sum is lse(s_i) − <q̂_i, E_i> / temperature less the teacher's entropy, with E_i = Σ_j p_ij k̂_j, so that memory
    grows with (N + M) · D.

    Args:
        query, keys: The pupil's embeddings, (N, D) and (M, D). float64, float32, float16 or bfloat16, any strides.
            Under autocast they may differ in dtype; the wider one is used. Both get their gradient.
        teacher_query, teacher_keys: The teacher's, (N, T) and (M, T) of any width T and floating dtype; no gradient.
        temperature: > 0, a float or a tensor of one element, which gets its gradient.
        teacher_temperature: > 0, without gradient; None is `temperature`.
        normalize: L2-normalise all rows first, as `F.normalize` does (eps 1e-12).
        reduction: "mean" over the N rows, "sum", or "none".
        row_weights: (N,) floating, or None. "none" and "sum" take weight · loss, "mean" divides their sum by that of
            the weights.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none". Never below 0.

    Raises:
        TypeError: Embeddings that are no floating tensors, or dtypes of query and keys that differ outside autocast.
        ValueError: Shapes that do not fit, an empty batch, mixed devices, a temperature not > 0, an unknown
            reduction or backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Fang et al., SEED, arXiv:2101.04731, eq. 4 (keys a queue); Hinton et al., arXiv:1503.02531.
    """
    query, keys = checked_rows(OP, 1, query=query, keys=keys)
    check_embeddings(OP, teacher_query=teacher_query)
    check_embeddings(OP, teacher_keys=teacher_keys)
    check_same_rows(OP, query=query, teacher_query=teacher_query)
    check_same_rows(OP, keys=keys, teacher_keys=teacher_keys)
    if teacher_query.shape[1] != teacher_keys.shape[1]:
        raise ValueError(
            f"{OP}: teacher_keys must have width {teacher_query.shape[1]} as teacher_query has,"
            f" got {teacher_keys.shape[1]}"
        )
    for name, tensor in (("teacher_query", teacher_query), ("teacher_keys", teacher_keys)):
        check_device(OP, name, tensor, query, "query")
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    check_scalar(OP, "temperature", temperature, query, positive=True)
    check_scalar(OP, "teacher_temperature", teacher_temperature, query, positive=True)
    check_reduction(OP, reduction, row_weights, query.shape[0], query)
    chosen = choose_backend("contrastive", backend, OP, query, keys)
    if chosen != "reference":
        refuse_torch_func(OP, chosen)
    scale = inverse(temperature, query)
    steepness = inverse(teacher_temperature, query).detach()
    if runs_in_blocks(chosen, query):
        weights = sample_weights(reduction, row_weights, query.shape[0], query)
        pupil, pairs = Prototypes(keys, scale, normalize, normalize), [(0, 0)]
        options = {"chosen": chosen, "caller": OP, "less_entropy": True}
        of_teacher = {"views": [teacher_query], "columns": teacher_keys, "steepness": steepness}
        loss = as_one_node([query], pupil, pairs, weights, **options, **of_teacher)
        if loss is None:
            teacher = _teacher(teacher_query, teacher_keys, steepness, normalize)
            loss = swapped_cross_entropy([query], pupil, teacher, pairs, weights, backend=backend, **options)
        return reduced(loss, weights, query, row_weights)
    query, keys = (rows_for_several(rows, backend, OP) for rows in (query, keys))
    (teacher_rows,), teacher_columns, _ = _teacher(teacher_query, teacher_keys, steepness, normalize)
    rows, columns = unit_rows(query, normalize), unit_rows(keys, normalize)
    lse = contrastive(
        query,
        keys,
        scale,
        normalize_rows=normalize,
        normalize_columns=normalize,
        backend=chosen,
        caller=OP,
    ).lse
    if chosen == "reference":
        with torch.autocast(query.device.type, enabled=False):
            logits = product(teacher_rows, teacher_columns.T)
            target = torch.softmax(logits, 1)
            minus_entropy = (
                (target * torch.log_softmax(logits, 1).masked_fill(target == 0, 0)).sum(1).double()
            )
            dots = row_dots(rows, product(target, columns))
    else:
        dots, minus_entropy = teacher_dots(chosen, rows, columns, teacher_rows, teacher_columns)
    return reduce(not_below_zero(minus_entropy + lse - scale * dots), reduction, query, row_weights)


distillation_loss.operation = "contrastive"


@torch.no_grad()
def _teacher(query, keys, steepness, normalize):
    query, keys = (unit_rows(x.detach().to(steepness.dtype), normalize) for x in (query, keys))
    return Teacher([steepness * query], keys, None)


class DistillationLoss(Loss):
    """`ssl_kernels.distillation_loss` as a module: `...(0.07)(query, keys, teacher_query, teacher_keys)`.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        teacher_temperature, normalize, reduction, backend: As in `distillation_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.07,
        teacher_temperature: float | torch.Tensor | None = None,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        teacher_query: torch.Tensor,
        teacher_keys: torch.Tensor,
        *,
        row_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return distillation_loss(
            query, keys, teacher_query, teacher_keys, row_weights=row_weights, **self.options
        )
