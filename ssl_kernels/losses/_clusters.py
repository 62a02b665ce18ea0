"""What the losses against prototypes share: cross-entropy of views of a sample against a teacher's softmax.

With the student's logits s (of unit rows x and prototypes y) and the teacher's probabilities p = softmax(t + bias),

    −Σ_k p_k log softmax(s)_k = lse(s) − <x, Σ_k p_k y_k> · scale

so that one streamed pass over the prototypes gives the first term and another the second; neither keeps anything of
size N × K. Views that share a teacher are added up before they meet its expectation.
"""

import torch

from ssl_kernels.checks import check_embeddings, check_same_rows
from ssl_kernels.losses._rows import row_dots
from ssl_kernels.losses._shared import rows_for_several, stacked, unit_rows
from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.ops.teacher_dots import teacher_dots
from ssl_kernels.reference.products import product


def views_of(op, name, value):
    """A list of the views in a tensor (V, N, D) or a sequence of V tensors (N, D), each checked."""
    if isinstance(value, torch.Tensor):
        if value.dim() != 3 or 0 in value.shape:
            raise ValueError(
                f"{op}: {name} must have shape (V, N, D) with V, N, D >= 1 or be a sequence of tensors (N, D),"
                f" got {tuple(value.shape)}"
            )
        views = list(value.unbind(0))
    elif isinstance(value, (list, tuple)):
        views = list(value)
    else:
        raise TypeError(f"{op}: {name} must be a tensor or a sequence of tensors, got {type(value).__name__}")
    if not views:
        raise ValueError(f"{op}: {name} must hold a view, got none")
    named = {f"{name}[{k}]": view for k, view in enumerate(views)}
    check_embeddings(op, **named)
    check_same_rows(op, **named)
    return views


def swapped_cross_entropy(
    student,
    prototypes,
    scale,
    teacher,
    pairs,
    *,
    normalize,
    normalize_prototypes,
    backend,
    chosen,
    caller,
):
    """Mean over the pairs of the cross-entropies of samples, (N,) float64.

    Args:
        student: V tensors (N, D).
        prototypes: (K, D).
        scale: 0-d, of the student's logits.
        teacher: (rows, columns) as `biased` makes them of A tensors (N, T) and the teacher's prototypes.
        pairs: (a, v): view v of the student is to have the probabilities of the teacher's view a.
        backend, chosen: What the caller asked for, and the backend that runs the call.
    """
    n = student[0].shape[0]
    counts = [sum(v == view for _, v in pairs) for view in range(len(student))]
    student = [rows_for_several(view, backend, caller) for view in student]
    prototypes = rows_for_several(prototypes, backend, caller)
    lse = contrastive(
        stacked(*(view for view, count in zip(student, counts, strict=True) if count)),
        prototypes,
        scale,
        normalize_rows=normalize,
        normalize_columns=normalize_prototypes,
        backend=chosen,
        caller=caller,
    ).lse
    used = [count for count in counts if count]
    lse = sum(count * each for count, each in zip(used, lse.view(len(used), n).unbind(0), strict=True))
    views = [unit_rows(view, normalize) for view in student]
    teachers = 1 + max(a for a, _ in pairs)
    swapped = [sum(views[v] for of, v in pairs if of == a) for a in range(teachers)]
    dots = expected_dots(chosen, torch.cat(swapped), unit_rows(prototypes, normalize_prototypes), *teacher)
    return (lse - scale * dots.view(teachers, n).sum(0)) / len(pairs)


def biased(rows, columns, biases):
    """(rows, columns) with the logits <rows_i, columns_k> + bias_k, by a feature of value 1 for each bias.

    Args:
        rows: A tensors (N, T).
        columns: (K, T).
        biases: None, one (K,) for all, or one for each of rows.
    """
    if biases is None:
        return torch.cat(rows), columns
    if len(biases) == 1:
        rows = torch.cat(rows)
        return torch.cat((rows, torch.ones_like(rows[:, :1])), 1), torch.cat((columns, biases[0][:, None]), 1)
    ones = [
        torch.cat(
            [
                torch.ones_like(own[:, :1]) if k == a else torch.zeros_like(own[:, :1])
                for k in range(len(biases))
            ],
            1,
        )
        for a, own in enumerate(rows)
    ]
    rows = torch.cat([torch.cat((own, of), 1) for own, of in zip(rows, ones, strict=True)])
    return rows, torch.cat((columns, torch.stack(biases, 1)), 1)


def expected_dots(chosen, x, y, rows, columns):
    """<x_i, Σ_k p_ik y_k>, (N,) float64, p_i = softmax over k of <rows_i, columns_k>, which get no gradient."""
    if chosen == "reference":
        probabilities = torch.softmax(product(rows, columns.T), 1)
        return row_dots(x, product(probabilities, y))
    return teacher_dots(chosen, x, y, rows, columns)[0]
