"""Bounding boxes beside mixed images."""

from typing import NamedTuple

import torch

from ssl_kernels.checks import check_dense, check_device, shape_error, short


class MixedBoxes(NamedTuple):
    """The objects in each image of a mixed batch, its own and then its partner's: lists with a tensor per image."""

    boxes: list  # (m_i, 4), xyxy
    labels: list | None  # (m_i, ...)
    lam: list  # (m_i,) float32, the share with which each object is to be seen


def check_boxes(op, boxes, labels, batch):
    """`boxes` must be `batch` tensors (n_i, 4) of one dtype and device in a list, `labels` None or a list likewise."""
    _check_list(op, "boxes", boxes, batch)
    for i, box in enumerate(boxes):
        check_dense(op, f"boxes[{i}]", box)
        if box.dim() != 2 or box.shape[1] != 4:
            raise shape_error(op, f"boxes[{i}]", "(n, 4)", box)
        if box.dtype == torch.bool or box.is_complex() or box.dtype != boxes[0].dtype:
            rule = "real numbers" if i == 0 else f"{short(boxes[0].dtype)} as boxes[0] is"
            raise TypeError(f"{op}: boxes[{i}] must be {rule}, got {short(box.dtype)}")
        check_device(op, f"boxes[{i}]", box, boxes[0], "boxes[0]")
        named = getattr(getattr(box, "format", None), "name", "XYXY")  # torchvision's BoundingBoxes
        if named != "XYXY":
            raise ValueError(f"{op}: boxes[{i}] must have the format XYXY, got {named}")
    if labels is None:
        return
    _check_list(op, "labels", labels, batch)
    for i, (label, box) in enumerate(zip(labels, boxes, strict=True)):
        check_dense(op, f"labels[{i}]", label)
        if label.dim() == 0 or len(label) != len(box) or label.shape[1:] != labels[0].shape[1:]:
            raise shape_error(op, f"labels[{i}]", f"{(len(box), *labels[0].shape[1:])} with its boxes", label)
        if label.dtype != labels[0].dtype:
            raise TypeError(
                f"{op}: labels[{i}] must be {short(labels[0].dtype)} as labels[0] is, got {short(label.dtype)}"
            )
        if label.device != box.device:
            raise ValueError(
                f"{op}: labels[{i}] must be on {box.device} as its boxes are, got {label.device}"
            )


def _check_list(op, name, value, batch):
    is_list = isinstance(value, (list, tuple))
    if not is_list or len(value) != batch:
        given = f"{len(value)} of them" if is_list else type(value).__name__
        raise ValueError(
            f"{op}: {name} must be a list with a tensor for each of the {batch} images, got {given}"
        )


def mix_boxes(boxes, labels, draw, min_visible):
    """`MixedBoxes` of what `check_boxes` has let pass, by the rule in `Mixup.mix_boxes`; waits for the device."""
    device, partners = boxes[0].device, draw.permutation.tolist()
    plain = [box.detach().as_subclass(torch.Tensor) for box in boxes]
    # Candidates image by image, its own and then its partner's.
    sources = [source for i, partner in enumerate(partners) for source in (i, partner)]
    counts = [len(plain[source]) for source in sources]
    box = torch.cat([plain[source] for source in sources])
    place = torch.arange(len(sources), device=device).repeat_interleave(torch.tensor(counts, device=device))
    image, is_partner = place // 2, place % 2 == 1
    lam = draw.pixel_lam.to(device)[image]
    if draw.boxes is None:
        region = torch.zeros(len(box), 4, dtype=torch.float64, device=device)
    else:
        region = draw.boxes.to(device)[image].double()[:, [2, 0, 3, 1]]  # xyxy
    moved = draw.permutation.to(device)[image] != image
    pasted = moved & (_area(region) > 0)
    share = torch.where(is_partner, torch.where(pasted, 1, 1 - lam), lam)
    share = torch.where(moved, share, (~is_partner).to(share.dtype))
    wide = box.double()
    inside = torch.cat(
        [torch.maximum(wide[:, :2], region[:, :2]), torch.minimum(wide[:, 2:], region[:, 2:])], 1
    )
    hidden = _area(inside)
    visible = torch.where(is_partner, hidden, _area(wide) - hidden)
    clipped = torch.where(is_partner[:, None], inside, _around_the_rest(wide, region))
    is_seen = (visible > 0) & (visible >= min_visible * _area(wide))
    keep = (share > 0) & (is_seen | ~pasted)
    box = torch.where((pasted & keep)[:, None], clipped.to(box.dtype), box)
    kept = [sum(part) for part in _in_parts(keep.tolist(), counts)]
    sizes = [own + partner for own, partner in zip(kept[::2], kept[1::2], strict=True)]
    if labels is not None:
        values = [label.detach().as_subclass(torch.Tensor) for label in labels]
        labels = list(torch.cat([values[source] for source in sources])[keep].split(sizes))
    return MixedBoxes(list(box[keep].split(sizes)), labels, list(share[keep].split(sizes)))


def _in_parts(values, counts):
    start = 0
    for count in counts:
        yield values[start : start + count]
        start += count


def _area(box):
    """Of (n, 4) xyxy; 0 where an end comes before its beginning."""
    return (box[:, 2] - box[:, 0]).clamp(min=0) * (box[:, 3] - box[:, 1]).clamp(min=0)


def _around_the_rest(box, region):
    """The smallest boxes around what the regions leave of boxes that they do not hide."""
    begin, end = box[:, :2], box[:, 2:]
    region_begin, region_end = region[:, :2], region[:, 2:]
    spans = (region_begin <= begin) & (region_end >= end)  # along x and along y
    across = spans.flip(1)  # a side moves only where the region takes all of it
    begin = torch.where(across & (region_begin <= begin), torch.maximum(begin, region_end), begin)
    end = torch.where(across & (region_end >= end), torch.minimum(end, region_begin), end)
    return torch.cat([begin, end], 1)
