"""DINO: the student's softmax over the prototypes is to be the momentum teacher's, of other crops or masked patches."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ssl_kernels.backends import choose_backend
from ssl_kernels.checks import (
    check_choice,
    check_device,
    check_embeddings,
    check_floating,
    check_reduction,
    check_same_rows,
    check_scalar,
    check_shape,
    check_tensor,
    shape_error,
    short,
    values_are_readable,
)
from ssl_kernels.losses._clusters import (
    Prototypes,
    Teacher,
    as_one_node,
    reduced,
    sample_weights,
    swapped_cross_entropy,
    views_of,
)
from ssl_kernels.losses._logits import are_one_node, one_node, swapped_logits
from ssl_kernels.losses._module import Loss
from ssl_kernels.losses._shared import inverse, unit_rows, widest_under_autocast
from ssl_kernels.losses.sinkhorn import check_iterations, group_name
from ssl_kernels.ops.column_potentials import column_potentials
from ssl_kernels.ops.library import accumulation_dtype, refuse_torch_func
from ssl_kernels.reference.clustering import potentials
from ssl_kernels.reference.products import product

if TYPE_CHECKING:
    from ssl_kernels.nn.center import DINOCenter

OP = "dino_loss"


def dino_loss(
    student: torch.Tensor | Sequence[torch.Tensor],
    teacher: torch.Tensor | Sequence[torch.Tensor],
    prototypes: torch.Tensor | None = None,
    teacher_prototypes: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 0.1,
    teacher_temperature: float | torch.Tensor = 0.04,
    *,
    center: "DINOCenter | torch.Tensor | None" = None,
    centering: str = "center",
    iterations: int = 3,
    mask: torch.Tensor | None = None,
    normalize: bool = True,
    normalize_prototypes: bool = True,
    reduction: str = "mean",
    row_weights: torch.Tensor | None = None,
    group: Any = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Self-distillation: cross-entropy of the student's softmax over the prototypes against the teacher's.

        loss_i = 1 / P · Σ_a Σ_{v ≠ a} −Σ_k p_a,ik log softmax(s_v,i / temperature)_k
        p_a,i = softmax((t_a,i − center) / teacher_temperature), or the `sinkhorn` assignments of t at that temperature

    over the teacher's crops a and the student's v, of which crop k of the one is crop k of the other, P pairs in all.
    With prototypes, s_v,i = <x̂_v,i, ŵ>, and neither logits nor probabilities are kept: one streamed pass over the
    prototypes gives the student's log-sum-exps, another the teacher's expectation. Memory grows with (V · N + K) · D.

    Args:
        student: (V, N, D) or a sequence of V tensors (N, D): what the student's head makes of V crops before its last
            layer. float64, float32, float16 or bfloat16, any strides. Without prototypes the logits, (V, N, K).
        teacher: (A, N, T), A <= V, likewise, of any floating dtype. No gradient.
        prototypes: (K, D), the weight of the student's last layer, or None for logits.
        teacher_prototypes: (K, T), the teacher's; None takes `prototypes`. No gradient.
        temperature: > 0, a float or a tensor of one element, which gets its gradient.
        teacher_temperature: > 0, without gradient.
        center: (K,) floating, subtracted from the teacher's logits, or an `nn.DINOCenter`; None is 0.
        centering: "center", or "sinkhorn": all the teacher's crops use the prototypes alike; then center is None.
        iterations: Of "sinkhorn", at least 1.
        mask: Patch tokens instead of crops, as in iBOT: student and teacher are (V, N, L, D) and (V, N, L, T), mask is
            (V, N, L) bool, and the student's token meets the teacher's of the same place where the mask is True. The
            loss of an image is the mean over its crops of the mean over the masked tokens, 0 where there are none.
        normalize: L2-normalise the rows first, as `F.normalize` does (eps 1e-12). Not of logits.
        normalize_prototypes: The same of the prototypes, as a weight-normalised last layer has them.
        reduction: "mean" over the N images, "sum", or "none".
        row_weights: (N,) floating, or None. "none" and "sum" take weight · loss, "mean" divides their sum by that of
            the weights.
        group: A process group whose ranks' images share the prototypes in "sinkhorn". The loss is that of this rank's.
        backend: "native", "triton", "chunked" or "reference"; None picks (see `ssl_kernels.backends_for`).

    Returns:
        float32 (float64 for float64 input): a scalar, or (N,) for "none".

    Raises:
        TypeError: Rows that are no floating tensors, or dtypes of the student and its prototypes that differ outside
            autocast.
        ValueError: Shapes that do not fit, no pair of different crops, mixed devices, a temperature not > 0, an unknown
            centering, reduction or backend, or a backend that cannot run this call.
        RuntimeError: A second derivative is asked of a backend other than "reference".

    Source: Caron et al., DINO, arXiv:2104.14294, algorithm 1; Zhou et al., iBOT, arXiv:2111.07832, eq. 3; "sinkhorn":
    Oquab et al., DINOv2, arXiv:2304.07193.
    """
    students, teachers = _checked_views(student, teacher, mask)
    n = students[0].shape[0] if mask is None else mask.shape[1]
    if prototypes is None:
        students = list(widest_under_autocast(*students))
    else:
        *students, prototypes = widest_under_autocast(*students, prototypes)
    teacher_prototypes = _checked_prototypes(students, teachers, prototypes, teacher_prototypes)
    like = students[0]
    clusters = (like if prototypes is None else prototypes).shape[-1 if prototypes is None else 0]
    check_scalar(OP, "temperature", temperature, like, positive=True)
    check_scalar(OP, "teacher_temperature", teacher_temperature, like, positive=True)
    center = _checked_center(center, centering, clusters, like)
    check_iterations(OP, iterations)
    check_reduction(OP, reduction, row_weights, n, like)
    name = group_name(OP, group)
    pairs = [(a, v) for a in range(len(teachers)) for v in range(len(students)) if v != a or mask is not None]
    if not pairs:
        raise ValueError(f"{OP}: student must hold a crop beside the teacher's one, got 1 crop of each")
    chosen = choose_backend("contrastive", backend, OP, like, like if prototypes is None else prototypes)
    is_plain = prototypes is None and mask is None and centering == "center"
    if is_plain and chosen == "native" and reduction != "none":
        temperatures = temperature, teacher_temperature
        teachers = [view.detach() for view in teachers]
        if are_one_node(students, teachers, temperatures, row_weights):
            return one_node(students, teachers, *temperatures, center, pairs, reduction)
    if chosen != "reference":
        refuse_torch_func(OP, chosen)
    if mask is not None:
        students, teachers, places = _masked_tokens(students, teachers, mask)
        pairs = [(0, 0)]
    scale, steepness = inverse(temperature, like), inverse(teacher_temperature, like).detach()
    if mask is None and prototypes is not None and centering == "center":
        weights = sample_weights(reduction, row_weights, n, like)
        loss = as_one_node(
            students,
            Prototypes(prototypes, scale, normalize, normalize_prototypes),
            pairs,
            weights,
            chosen=chosen,
            caller=OP,
            steepness=steepness,
            views=teachers,
            columns=teacher_prototypes,
            bias=center,
        )
        if loss is not None:
            return reduced(loss, weights, like, row_weights)
    with torch.no_grad(), torch.autocast(like.device.type, enabled=False):
        acc = accumulation_dtype(like)
        teachers = [view.detach() for view in teachers]
        if prototypes is None:
            columns = None
        else:
            columns = unit_rows(teacher_prototypes.detach().to(acc), normalize_prototypes)
            teachers = [steepness * unit_rows(view.to(acc), normalize) for view in teachers]
        bias = None if center is None else -steepness * center.to(acc)
        if centering == "sinkhorn":
            rows = torch.cat(teachers)
            bias = _potentials(
                rows if columns is not None else steepness * rows.to(acc),
                columns,
                mask.flatten() if mask is not None and places is None else None,
                iterations,
                name,
                chosen,
            )
    weights = image_weights = sample_weights(reduction, row_weights, n, like)
    if mask is not None and weights is not None:
        weights = _weights_of_tokens(image_weights, places, mask)
    if prototypes is None:
        loss = swapped_logits(
            students, scale, teachers, steepness, bias, pairs, weights, caller=OP, chosen=chosen
        )
    else:
        loss = swapped_cross_entropy(
            students,
            Prototypes(prototypes, scale, normalize, normalize_prototypes),
            Teacher(teachers, columns, None if bias is None else bias[None]),
            pairs,
            weights,
            backend=backend,
            chosen=chosen,
            caller=OP,
        )
    if mask is not None and weights is None:
        loss = _of_images(loss, places, mask)
    return reduced(loss, weights, like, row_weights)


dino_loss.operation = "contrastive"


def _checked_views(student, teacher, mask):
    """Views of the student and the teacher as lists of (N, D), with a mask of all tokens (N · L, D), and the mask."""
    if mask is None:
        students, teachers = views_of(OP, "student", student), views_of(OP, "teacher", teacher)
    else:
        shape = _checked_mask(mask)
        students, teachers = (
            views_of(OP, name, _flat_tokens(name, tokens, shape, mask))
            for name, tokens in (("student", student), ("teacher", teacher))
        )
    if len(teachers) > len(students):
        raise ValueError(
            f"{OP}: teacher must hold at most the {len(students)} crops of student, got {len(teachers)}"
        )
    check_same_rows(OP, student=students[0], teacher=teachers[0])
    check_device(OP, "teacher", teachers[0], students[0], "student")
    return students, teachers


def _checked_mask(mask):
    check_tensor(OP, "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{OP}: mask must be bool, got {short(mask.dtype)}")
    if mask.dim() != 3 or 0 in mask.shape:
        raise shape_error(OP, "mask", "(V, N, L) with V, N, L >= 1", mask)
    return tuple(mask.shape)


def _flat_tokens(name, tokens, shape, mask):
    """(V, N · L, D) of (V, N, L, D), which may be a sequence of the V."""
    if isinstance(tokens, (list, tuple)) and tokens:
        tokens = torch.stack(tuple(tokens))
    if not isinstance(tokens, torch.Tensor):
        raise TypeError(
            f"{OP}: {name} must be a tensor or a sequence of tensors, got {type(tokens).__name__}"
        )
    if tokens.dim() != 4 or tuple(tokens.shape[:3]) != shape or not tokens.shape[3]:
        expected = ", ".join(map(str, shape))
        raise shape_error(OP, name, f"({expected}, D) as mask has", tokens)
    check_device(OP, name, tokens, mask, "mask")
    return tokens.flatten(1, 2)


def _checked_prototypes(students, teachers, prototypes, teacher_prototypes):
    """The teacher's prototypes, None for logits."""
    if prototypes is None:
        if teacher_prototypes is not None:
            raise ValueError(f"{OP}: teacher_prototypes must be None without prototypes, got a tensor")
        if teachers[0].shape[1] != students[0].shape[1]:
            raise ValueError(
                f"{OP}: teacher must have width {students[0].shape[1]} as student has, got {teachers[0].shape[1]}"
            )
        return None
    check_embeddings(OP, student=students[0], prototypes=prototypes)
    if teacher_prototypes is None:
        teacher_prototypes = prototypes
    check_embeddings(OP, teacher_prototypes=teacher_prototypes)
    check_same_rows(OP, prototypes=prototypes, teacher_prototypes=teacher_prototypes)
    if teacher_prototypes.shape[1] != teachers[0].shape[1]:
        raise ValueError(
            f"{OP}: teacher_prototypes must have width {teachers[0].shape[1]} as teacher has,"
            f" got {teacher_prototypes.shape[1]}"
        )
    check_device(OP, "teacher_prototypes", teacher_prototypes, prototypes)
    return teacher_prototypes


def _checked_center(center, centering, clusters, like):
    check_choice(OP, "centering", centering, "center", "sinkhorn")
    if center is None:
        return None
    if centering == "sinkhorn":
        raise ValueError(f'{OP}: center must be None with centering "sinkhorn", got {type(center).__name__}')
    center = getattr(center, "center", center)  # an nn.DINOCenter's buffer
    check_shape(OP, "center", center, (clusters,), like)
    check_floating(OP, "center", center)
    return center.detach()


def _masked_tokens(students, teachers, mask):
    """One view each with the masked tokens alone, and their places among all; under a trace, which knows no numbers of
    rows that depend on values, all tokens and None."""
    flat = mask[: len(teachers)].reshape(-1)
    students, teachers = torch.cat(students[: len(teachers)]), torch.cat(teachers)
    if values_are_readable(flat) or (flat.is_cuda and not torch.compiler.is_compiling()):
        places = flat.nonzero()[:, 0]
        if len(places):
            return [students[places]], [teachers[places]], places
    return [students], [teachers], None


def _shares(mask):
    """(A, N, L) float64: how much a token counts in the loss of its image."""
    return mask.double() / mask.sum(2, keepdim=True).clamp_min(1) / mask.shape[0]


def _weights_of_tokens(weights, places, mask):
    """Those of the images (N,), divided among their tokens."""
    weights = (weights[:, None] * _shares(mask)).flatten()
    return weights if places is None else weights[places]


def _of_images(loss, places, mask):
    """(N,) of the losses of tokens."""
    if places is not None:
        loss = loss.new_zeros(mask.numel()).index_copy(0, places, loss)
    return (loss.view(mask.shape) * _shares(mask)).sum((0, 2))


def _potentials(rows, columns, counts, iterations, name, chosen):
    if chosen == "reference" and not name and counts is None:
        return potentials(rows if columns is None else product(rows, columns.T), iterations)
    return column_potentials(rows, columns, iterations=iterations, counts=counts, group=name)


class DINOLoss(Loss):
    """`ssl_kernels.dino_loss` as a module: `DINOLoss()(student, teacher, prototypes, teacher_prototypes,
    center=center)`.

    The centre is an argument and no part of the module: an `nn.DINOCenter`, which the training step updates, or a
    tensor.

    Args:
        temperature: > 0, a float, a tensor of one element, or an `nn.Parameter` to learn it.
        teacher_temperature, centering, iterations, normalize, normalize_prototypes, reduction, backend: As in
        `dino_loss`.
    """

    def __init__(
        self,
        temperature: float | torch.Tensor = 0.1,
        teacher_temperature: float | torch.Tensor = 0.04,
        *,
        centering: str = "center",
        iterations: int = 3,
        normalize: bool = True,
        normalize_prototypes: bool = True,
        reduction: str = "mean",
        backend: str | None = None,
    ) -> None:
        super().__init__(locals())

    def forward(
        self,
        student: torch.Tensor | Sequence[torch.Tensor],
        teacher: torch.Tensor | Sequence[torch.Tensor],
        prototypes: torch.Tensor | None = None,
        teacher_prototypes: torch.Tensor | None = None,
        *,
        center: "DINOCenter | torch.Tensor | None" = None,
        mask: torch.Tensor | None = None,
        row_weights: torch.Tensor | None = None,
        group: Any = None,
    ) -> torch.Tensor:
        return dino_loss(
            student,
            teacher,
            prototypes,
            teacher_prototypes,
            center=center,
            mask=mask,
            row_weights=row_weights,
            group=group,
            **self.options,
        )
