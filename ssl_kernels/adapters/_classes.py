"""Rows of the same class by their indices, without a matrix of all pairs."""

import torch


def as_classes(*labels):
    """Labels as int64 tensors that are equal where the labels are; they may be bool or floating."""
    if len(labels) == 1 and labels[0].dtype == torch.int64:  # a call costs time
        return labels
    if all(not part.is_floating_point() for part in labels):
        return [part.long() for part in labels]
    ranks = torch.unique(torch.cat([part.double() for part in labels]), return_inverse=True)[1]
    return list(ranks.split([len(part) for part in labels]))


def has_mate(labels):
    """Whether another row has each label, (N,) bool of (N,)."""
    _, place, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    return sizes[place] > 1


def class_mates(labels, memory_labels=None):
    """For each label the indices of the rows of `memory_labels` that have it too, padded to the largest number.

    Args:
        labels: (N,) int64.
        memory_labels: (M,), or None: labels themselves, and a row is no mate of its own.

    Returns:
        (mates, is_mate): (N, P) int64 and bool; mates is 0 where is_mate is False. P is at least 1.
    """
    memory = labels if memory_labels is None else memory_labels
    ordered, order = memory.sort(stable=True)
    first = torch.searchsorted(ordered, labels)
    count = torch.searchsorted(ordered, labels, right=True) - first
    width = max(1, int(count.max()) if len(count) else 0)
    place = first[:, None] + torch.arange(width, device=labels.device)
    is_mate = place < (first + count)[:, None]
    mates = order[place.clamp_max_(max(0, len(order) - 1))] if len(order) else torch.zeros_like(place)
    if memory_labels is None:
        is_mate &= mates != torch.arange(len(labels), device=labels.device)[:, None]
    return mates.masked_fill(~is_mate, 0), is_mate
