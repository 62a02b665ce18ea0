"""Labels and ids as users have them, as the int64 tensors that the operations take."""

import torch

from ssl_kernels.checks import check_ids, check_shape, is_number, short, values_are_readable

BITS = 64  # of an int64


def as_ids(op, name, value, shape, like):
    """`value` as int64 of `shape`: integers or bool; where one number per row is asked for, also (N, 1).

    Raises:
        TypeError, ValueError: It is no such tensor on the device of `like`.
    """
    shape = tuple(shape)
    if isinstance(value, torch.Tensor):
        if len(shape) == 1 and tuple(value.shape) == (*shape, 1):
            value = value.squeeze(1)
        if value.dtype == torch.bool:
            check_shape(op, name, value, shape, like)
            return value.long()
    check_ids(op, name, value, shape, like)
    return value.long()


def checked_duplicates(op, ids, image_index, image_features, text_features):
    """(ids, image_index) of texts and their images, of which at most one may be given, as int64 or None."""
    if image_index is None:
        ids = None if ids is None else as_ids(op, "ids", ids, image_features.shape[:1], image_features)
    elif ids is not None:
        raise ValueError(f"{op}: ids must be None with image_index")
    else:
        image_index = as_index(op, "image_index", image_index, text_features.shape[0], image_features)
    return ids, image_index


def as_index(op, name, value, count, like):
    """`value` as (count,) int64 rows of `like`, looked at where that waits for no device.

    Raises:
        TypeError, ValueError: It is no such tensor on the device of `like`, or an index lies outside.
    """
    check_ids(op, name, value, (count,), like)
    if values_are_readable(value):
        bad = value[(value < 0) | (value >= like.shape[0])]
        if len(bad):
            raise ValueError(f"{op}: {name} must be in [0, {like.shape[0]}), got {bad[0].item()}")
    return value.long()


def check_unlabelled(op, unlabelled):
    if unlabelled is not None and not (is_number(unlabelled) and float(unlabelled).is_integer()):
        raise TypeError(f"{op}: unlabelled must be an integer or None, got {unlabelled!r}")


def without_unlabelled(labels, unlabelled):
    """int64 labels in which every row that was labelled `unlabelled` is the only one of its label."""
    ordered, order = labels.sort(stable=True)
    rank = ranks(ordered)
    own = torch.arange(-1, -1 - labels.shape[0], -1, device=labels.device)
    return own.where(labels == int(unlabelled), torch.empty_like(rank).scatter_(0, order, rank))


def ranks(ordered):
    """Numbers from 0 on of the different values of a sorted tensor, without slices, which would bound its length."""
    begins = (ordered != ordered.roll(1)).long()  # the first may, or may not: what it counts is taken off
    return begins.cumsum(0) - begins[0]


def bit_sets(op, name, members):
    """(N, C) of 0 and 1 as (N, W) int64, one bit per column."""
    if members.is_floating_point() or members.is_complex():
        raise TypeError(f"{op}: {name} must be integers or bool, got {short(members.dtype)}")
    if values_are_readable(members) and members.dtype != torch.bool:
        bad = members[(members != 0) & (members != 1)]
        if len(bad):
            raise ValueError(f"{op}: {name} of several columns must be 0 or 1, got {bad[0].item()}")
    shifts = torch.arange(BITS, device=members.device)
    words = [(word != 0).long() << shifts[: word.shape[1]] for word in members.split(BITS, 1)]
    return torch.stack([word.sum(1) for word in words], 1)
