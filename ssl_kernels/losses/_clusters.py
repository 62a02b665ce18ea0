"""What the losses against prototypes share: cross-entropy of views of a sample against a teacher's softmax.

With the student's logits s (of unit rows x and prototypes y) and the teacher's probabilities p = softmax(t + bias),

    −Σ_k p_k log softmax(s)_k = lse(s) − <x, Σ_k p_k y_k> · scale

so that neither term needs anything of size N × K in memory. On the CPU and in plain PyTorch both are made of one block
of logits after the other (`cluster_cross_entropy`); the kernels of a GPU stream over the prototypes once for the first
term and once for the second, where views that share a teacher are added up before they meet its expectation.
"""

from typing import NamedTuple

import torch

from ssl_kernels.checks import check_embeddings, check_same_rows, shape_error
from ssl_kernels.chunked.rows import LOGITS_PER_BLOCK
from ssl_kernels.losses._shared import (
    may_be_one_node,
    not_below_zero,
    reduce,
    rows_for_several,
    stacked,
    unit_rows,
)
from ssl_kernels.ops.cluster_cross_entropy import cluster_cross_entropy
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.library import accumulation_dtype
from ssl_kernels.ops.teacher_dots import teacher_dots
from ssl_kernels.reference.products import product


def views_of(op, name, value):
    """A list of the views in a tensor (V, N, D) or a sequence of V tensors (N, D), each checked."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 3 or 0 in value.shape:
            raise shape_error(
                op, name, "(V, N, D) with V, N, D >= 1 or be a sequence of tensors (N, D)", value
            )
        views = list(value.unbind(0))
    elif isinstance(value, (list, tuple)):
        views = list(value)
    else:
        raise TypeError(f"{op}: {name} must be a tensor or a sequence of tensors, got {type(value).__name__}")
    if not views:
        raise ValueError(f"{op}: {name} must hold at least one view, got none")
    named = {f"{name}[{k}]": view for k, view in enumerate(views)}
    check_embeddings(op, **named)
    check_same_rows(op, **named)
    return views


class Teacher(NamedTuple):
    """The teacher's logits, rows @ columnsᵀ + bias."""

    rows: list  # A tensors (N, T)
    columns: torch.Tensor  # (K, T)
    biases: torch.Tensor | None  # (A, K), one for each of rows, (1, K) for all, or None


class Prototypes(NamedTuple):
    """The student's last layer: its logits are scale · <x̂, ŷ>."""

    columns: torch.Tensor  # (K, D)
    scale: torch.Tensor  # 0-d
    normalize_rows: bool
    normalize_columns: bool


def sample_weights(reduction, row_weights, n, like):
    """(N,) float64 with which a reduction adds up the samples' losses, or None for "none"."""
    if reduction == "none":
        return None
    if row_weights is None:
        weights = torch.ones(n, dtype=torch.float64, device=like.device)
        return weights / n if reduction == "mean" else weights
    weights = row_weights.to(torch.float64)
    if reduction == "sum":
        return weights
    total = weights.sum()
    return (weights / total.where(total != 0, 1)).where(total != 0, 0)


def reduced(loss, weights, like, row_weights):
    """What the caller asked for, of the losses of samples, or of their sum by `weights`."""
    if weights is None:
        return reduce(loss, "none", like, row_weights)
    return loss.to(accumulation_dtype(like))


def runs_in_blocks(chosen, x):
    """Whether `cluster_cross_entropy` runs a call."""
    return chosen == "chunked" or (chosen == "native" and not x.is_cuda)


def as_one_node(
    student,
    prototypes,
    pairs,
    weights,
    *,
    chosen,
    caller,
    less_entropy=False,
    assign=(),
    steepness,
    **teacher,
):
    """`swapped_cross_entropy` of samples added up by weights by `cluster_loss.native` (csrc/ops/cluster_loss.cpp), or
    None where it does not stand for that: of so few logits that they may all be there at once.

    Args:
        student: V tensors (N, D), or one (V, N, D).
        prototypes: `Prototypes`, whose switches hold for the teacher too.
        assign: Of SwAV the views whose codes the teacher's views are.
        steepness: 0-d, 1 / temperature of the teacher.
        teacher: `views`, `columns` and `bias` of another teacher, none of them made unit or steep; or of SwAV
            `iterations` and `group`.
    """
    if chosen != "native" or weights is None or not may_be_one_node(*student, *prototypes[:2], weights):
        return None
    columns, scale, normalize_rows, normalize_columns = prototypes
    views, n = (len(student), student[0].shape[0]) if student[0].dim() == 2 else student[0].shape[:2]
    if views * n * columns.shape[0] > LOGITS_PER_BLOCK:
        return None
    acc, bias, of_teacher = scale.dtype, teacher.get("bias"), []
    if "views" in teacher:
        of_teacher = [x.detach().to(acc) for x in (*teacher["views"], teacher["columns"])]
        bias = None if bias is None else (bias.to(acc) * -steepness).contiguous()
    if not may_be_one_node(steepness, *of_teacher) or not (bias is None or may_be_one_node(bias)):
        return None
    return torch.ops.ssl_kernels.cluster_loss.native(
        student,
        columns,
        scale,
        weights,
        of_teacher,
        bias,
        steepness.item(),
        teacher.get("iterations", 0),
        assign,
        [number for pair in pairs for number in pair],
        normalize_rows,
        normalize_columns,
        less_entropy,
        teacher.get("group", ""),
        caller,
    )


def swapped_cross_entropy(
    student, prototypes, teacher, pairs, weights, *, backend, chosen, caller, less_entropy=False
):
    """Mean over the pairs of the cross-entropies of samples, (N,) float64, or their sum by weights.

    Args:
        student: V tensors (N, D).
        prototypes, teacher: `Prototypes` and `Teacher`.
        pairs: (a, v): view v of the student is to have the probabilities of the teacher's view a.
        weights: (N,) float64, or None.
        backend, chosen: What the caller asked for, and the backend that runs the call.
        less_entropy: Divergences in place of cross-entropies, of a call that runs in blocks.
    """
    if runs_in_blocks(chosen, student[0]):
        return cluster_cross_entropy(
            stacked(*student),
            prototypes.columns,
            prototypes.scale,
            (torch.cat(teacher.rows), teacher.columns, teacher.biases),
            pairs,
            weights,
            views=len(student),
            normalize_rows=prototypes.normalize_rows,
            normalize_columns=prototypes.normalize_columns,
            less_entropy=less_entropy,
            caller=caller,
            chosen=chosen,
        )
    if chosen == "reference":
        losses = _by_definition(student, prototypes, teacher, pairs)
    else:
        losses = streamed(student, prototypes, teacher, pairs, backend=backend, chosen=chosen, caller=caller)
    losses = not_below_zero(losses)
    return losses if weights is None else (losses * weights).sum()


def _by_definition(student, prototypes, teacher, pairs):
    columns, scale, normalize_rows, normalize_columns = prototypes
    columns = unit_rows(columns, normalize_columns)
    codes = [product(rows, teacher.columns.T) for rows in teacher.rows]
    if teacher.biases is not None:
        biases = teacher.biases.expand(len(codes), -1).unbind(0)
        codes = [logits + bias for logits, bias in zip(codes, biases, strict=True)]
    codes = [torch.softmax(logits, 1) for logits in codes]
    logits = [torch.log_softmax(scale * product(unit_rows(x, normalize_rows), columns.T), 1) for x in student]
    return -sum((codes[a] * logits[v]).sum(1).double() for a, v in pairs) / len(pairs)


def streamed(student, prototypes, teacher, pairs, *, backend, chosen, caller):
    """`swapped_cross_entropy` by the algebra above, of samples, over `contrastive`."""
    columns, scale, normalize_rows, normalize_columns = prototypes
    n = student[0].shape[0]
    counts = [sum(v == view for _, v in pairs) for view in range(len(student))]
    student = [rows_for_several(view, backend, caller) for view in student]
    columns = rows_for_several(columns, backend, caller)
    lse = contrastive(
        stacked(*(view for view, count in zip(student, counts, strict=True) if count)),
        columns,
        scale,
        normalize_rows=normalize_rows,
        normalize_columns=normalize_columns,
        backend=chosen,
        caller=caller,
    ).lse
    used = [count for count in counts if count]
    lse = sum(count * each for count, each in zip(used, lse.view(len(used), n).unbind(0), strict=True))
    views = [unit_rows(view, normalize_rows) for view in student]
    teachers = len(teacher.rows)
    swapped = torch.cat([sum(views[v] for of, v in pairs if of == a) for a in range(teachers)])
    dots = teacher_dots(chosen, swapped, unit_rows(columns, normalize_columns), *_with_bias(teacher))[0]
    return (lse - scale * dots.view(teachers, n).sum(0)) / len(pairs)


def _with_bias(teacher):
    """(rows, columns) of the teacher with the bias as a product of features more: of 1 and the bias."""
    rows, columns, biases = teacher
    if biases is None:
        return torch.cat(rows), columns
    places = torch.eye(len(biases), dtype=columns.dtype, device=columns.device)
    places = places.expand(len(rows), -1) if len(biases) == 1 else places
    rows = [torch.cat((own, place.expand(len(own), -1)), 1) for own, place in zip(rows, places, strict=True)]
    return torch.cat(rows), torch.cat((columns, biases.T), 1)
