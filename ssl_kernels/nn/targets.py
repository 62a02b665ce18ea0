"""What `Mixup` makes of targets and masks: their kinds, their checks, and their mixtures."""

from typing import NamedTuple

import torch

from ssl_kernels.checks import (
    DTYPES,
    check_dense,
    check_device,
    check_target,
    shape_error,
    short,
    values_are_readable,
)

KINDS = ("classes", "values")


class MixedMasks(NamedTuple):
    """Masks of classes beside blended images: for a loss of every pixel, λ_i ℓ(target) + (1 − λ_i) ℓ(partner)."""

    target: torch.Tensor  # the masks; where a box was pasted, the partner's
    partner: torch.Tensor  # the partners' masks
    lam: torch.Tensor  # (B,) float32, the share of target; 1 where the image was pasted into or left as it is


def prepared_target(op, target, like, *, kind, num_classes, dense):
    """Classes as (B, ...) int64, or values as floating numbers, after all checks; `like` is of the batch."""
    check_dense(op, "target", target)
    batch = len(like)
    if target.dim() == 0 or len(target) != batch or 0 in target.shape[1:]:
        raise shape_error(op, "target", f"({batch},) or ({batch}, ...) with no dimension of 0", target)
    check_device(op, "target", target, like, "x")
    is_whole = is_integer(target)
    if not is_whole and target.dtype not in (*DTYPES, torch.bool):
        raise TypeError(f"{op}: target must be integer, bool or floating, got {short(target.dtype)}")
    if kind == "classes" and not is_whole:
        raise TypeError(
            f'{op}: target must hold classes of an integer dtype for target_kind "classes", got {short(target.dtype)}'
        )
    if kind is None and is_whole and target.dim() > 2:
        raise ValueError(
            f"{op}: target must have shape ({batch},) with classes or ({batch}, C) with 0s and 1s where it is integer,"
            f" got {tuple(target.shape)}; pass class maps as masks, or say what it holds by target_kind"
        )
    if kind == "classes" or (kind is None and is_whole and target.dim() == 1):
        if dense:
            _check_dense_classes(op, target, num_classes)
        return target.to(torch.int64)
    if target.is_floating_point():
        return target
    if kind is None and is_whole and values_are_readable(target):
        bad = target[(target != 0) & (target != 1)]
        if len(bad):
            raise ValueError(
                f"{op}: target must hold 0s and 1s where it is integer and of shape {tuple(target.shape)}, got"
                f' {bad[0].item()}; target_kind "values" mixes any numbers'
            )
    return target.to(torch.float32)


def one_hot(target, num_classes, label_smoothing):
    """(B, C) float32 of (B,) classes."""
    rest = label_smoothing / num_classes
    dense = torch.full((len(target), num_classes), rest, dtype=torch.float32, device=target.device)
    return dense.scatter_(1, target[:, None], 1 - label_smoothing + rest)


def is_integer(tensor):
    """Whether it holds whole numbers; bools are none."""
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)


def _check_dense_classes(op, target, num_classes):
    if target.dim() != 1:
        raise shape_error(op, "target", f"({len(target)},) to become dense", target)
    if num_classes is None:
        raise ValueError(f"{op}: num_classes must be given for dense targets from integer ones, got None")
    if values_are_readable(target):
        check_target(op, target, num_classes)
