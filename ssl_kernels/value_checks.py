"""Checks of the values of index tensors and shares. They read the tensor: on a GPU that waits for the device."""

import torch

from ssl_kernels.checks import can_be_read


def check_values(op, permutation, lam=None, *, boxes=None, image=None):
    """All of those below whose tensors are given; `image` is (height, width)."""
    check_permutation(op, permutation)
    if lam is not None:
        check_lam(op, lam)
    if boxes is not None:
        check_boxes(op, boxes, *image)


def check_mixed_target(op, target, partner, lam, classes, ignore_index, partner_is_class):
    """Of classes to mix: `partner` holds the partners' classes or is a permutation."""
    if partner_is_class:
        check_target(op, partner, classes, ignore_index, "partner_target")
    else:
        check_permutation(op, partner)
    check_lam(op, lam)
    check_target(op, target, classes, ignore_index)


def check_mixed_target_on_cpu(op, target, *args):
    """`check_mixed_target` where reading values waits for nothing, and in calls that are not being traced."""
    if can_be_read(target):
        check_mixed_target(op, target, *args)


def check_on_cpu(op, permutation, *args, **options):
    """`check_values` where reading values waits for nothing, and in calls that are not being traced."""
    if can_be_read(permutation):
        check_values(op, permutation, *args, **options)


def check_permutation(op, permutation):
    """Each of 0 … B − 1 must be there once."""
    batch = len(permutation)
    if not torch.equal(permutation.sort().values, torch.arange(batch, device=permutation.device)):
        raise ValueError(
            f"{op}: permutation must hold each of 0 to {batch - 1} once, got {_some(permutation)}"
        )


def check_lam(op, lam):
    """Each must lie in [0, 1]."""
    bad = lam[~((lam >= 0) & (lam <= 1))]
    if len(bad):
        raise ValueError(f"{op}: lam must be in [0, 1], got {bad[0].item():g}")


def check_boxes(op, boxes, height, width):
    """0 <= y0 <= y1 <= height, 0 <= x0 <= x1 <= width."""
    y0, y1, x0, x1 = boxes.unbind(1)
    good = (y0 >= 0) & (y0 <= y1) & (y1 <= height) & (x0 >= 0) & (x0 <= x1) & (x1 <= width)
    if not good.all():
        raise ValueError(
            f"{op}: boxes must be (y0, y1, x0, x1) with 0 <= y0 <= y1 <= {height} and 0 <= x0 <= x1 <= {width},"
            f" got {tuple(boxes[~good][0].tolist())}"
        )


def check_target(op, target, classes, ignore_index=None, name="target"):
    """Each must be one of 0 … classes − 1, or ignore_index."""
    if target.numel():
        least, most = (value.item() for value in target.aminmax())
        if 0 <= least and most < classes:
            return
    outside = (target < 0) | (target >= classes)
    if ignore_index is not None:
        outside &= target != ignore_index
    bad = target[outside]
    if len(bad):
        raise ValueError(f"{op}: {name} must be in 0 to {classes - 1}, got {bad[0].item()}")


def _some(tensor, most=8):
    values = tensor[:most].tolist()
    return f"[{', '.join(map(str, values))}{', …' if len(tensor) > most else ''}]"
