"""Bounding boxes beside mixed images, against the pixels of each object."""

import pytest
import torch

from ssl_kernels.nn import MixedBoxes, MixingDraw, Mixup
from tests.helpers import same_bits

HEIGHT, WIDTH = 13, 17


def objects(batch, seed=0, dtype=torch.float32):
    """Boxes with corners between pixels, some images without any, and labels that name image and object."""
    generator = torch.Generator().manual_seed(seed)
    boxes, labels = [], []
    for i in range(batch):
        count = int(torch.randint(0, 5, (), generator=generator))
        x, y = (
            torch.stack(
                [torch.randperm(size + 1, generator=generator)[:2].sort().values for _ in range(count)]
            )
            if count
            else torch.zeros(0, 2, dtype=torch.int64)
            for size in (WIDTH, HEIGHT)
        )
        boxes.append(torch.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], 1).to(dtype))
        labels.append(100 * i + torch.arange(count))
    return boxes, labels


def pixels(box):
    x0, y0, x1, y1 = (int(value) for value in box)
    seen = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    seen[y0:y1, x0:x1] = True
    return seen


def around(seen):
    """The smallest box around pixels."""
    y, x = seen.any(1).nonzero().flatten(), seen.any(0).nonzero().flatten()
    return [x[0].item(), y[0].item(), x[-1].item() + 1, y[-1].item() + 1]


def expected_objects(boxes, labels, draw, min_visible):
    """(box, label, share) of each image, by the pixels that are to be seen of each object."""
    everything = []
    for i, partner in enumerate(draw.permutation.tolist()):
        lam = draw.pixel_lam[i].item()
        region = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
        if draw.boxes is not None:
            y0, y1, x0, x1 = draw.boxes[i].tolist()
            region[y0:y1, x0:x1] = True
        parts = [(i, ~region, lam), (partner, region, 1 - lam)]
        if partner == i:
            region[:], parts = False, [(i, ~region, 1.0)]
        found = []
        for source, left, share in parts:
            for box, label in zip(boxes[source], labels[source], strict=True):
                if region.any():
                    seen = pixels(box) & left
                    if seen.any() and seen.sum() >= min_visible * pixels(box).sum():
                        found.append((around(seen), label.item(), 1.0))
                elif share > 0:
                    found.append((box.tolist(), label.item(), share))
        everything.append(found)
    return everything


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float16], ids=str)
@pytest.mark.parametrize("min_visible", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.0, 1.0), (0.7, 0.7)])
@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_boxes_are_those_of_the_pixels(mode, alphas, min_visible, dtype):
    module = Mixup(*alphas, mode=mode, min_visible=min_visible, prob=0.8, generator=5, inplace=False)
    kept = 0
    for seed in range(6):
        boxes, labels = objects(7, seed, dtype)
        draw = module.draw(torch.zeros(7, 1, HEIGHT, WIDTH))
        found = module.mix_boxes(boxes, draw, labels)
        assert isinstance(found, MixedBoxes)
        for i, expected in enumerate(expected_objects(boxes, labels, draw, min_visible)):
            assert found.boxes[i].dtype == dtype and found.labels[i].dtype == torch.int64
            assert found.boxes[i].tolist() == [box for box, _, _ in expected]
            assert found.labels[i].tolist() == [label for _, label, _ in expected]
            assert found.lam[i].tolist() == pytest.approx([share for _, _, share in expected], abs=1e-6)
            kept += len(expected)
    assert kept > 0


def drawn(permutation, lam, boxes=None):
    lam = torch.tensor(lam)
    return MixingDraw(torch.tensor(permutation), lam, lam, None if boxes is None else torch.tensor(boxes))


def test_a_box_is_clipped_only_where_a_whole_side_is_hidden():
    boxes = [torch.tensor([[2.0, 2.0, 10.0, 8.0]]), torch.zeros(0, 4)]

    def left(y0, y1, x0, x1):
        draw = drawn([1, 0], [1.0, 1.0], [[y0, y1, x0, x1], [0, 0, 0, 0]])
        found = Mixup(0, 1.0, min_visible=0).mix_boxes(boxes, draw)
        assert found.labels is None and len(found.boxes) == 2
        return found.boxes[0].tolist()

    assert left(0, 13, 0, 4) == [[4, 2, 10, 8]]
    assert left(0, 13, 7, 17) == [[2, 2, 7, 8]]
    assert left(2, 5, 2, 10) == [[2, 5, 10, 8]]
    assert left(6, 8, 0, 17) == [[2, 2, 10, 6]]
    assert left(0, 13, 4, 6) == [[2, 2, 10, 8]]
    assert left(0, 5, 0, 4) == [[2, 2, 10, 8]]
    assert left(2, 8, 2, 10) == []
    assert left(9, 13, 0, 17) == [[2, 2, 10, 8]]


def test_blended_images_have_the_boxes_of_both():
    boxes, labels = (
        [torch.tensor([[0.5, 1, 3, 4]]), torch.tensor([[2.0, 2, 5, 6.25]])],
        [torch.tensor([7]), torch.tensor([9])],
    )
    found = Mixup().mix_boxes(boxes, drawn([1, 0], [0.75, 1.0]), labels)
    assert found.boxes[0].tolist() == [[0.5, 1, 3, 4], [2, 2, 5, 6.25]]
    assert found.labels[0].tolist() == [7, 9] and found.lam[0].tolist() == [0.75, 0.25]
    assert found.boxes[1].tolist() == [[2, 2, 5, 6.25]] and found.lam[1].tolist() == [1]


def test_labels_may_be_of_any_shape_and_images_without_objects():
    boxes = [torch.zeros(0, 4), torch.tensor([[0.0, 0, 4, 4]])]
    labels = [torch.zeros(0, 3), torch.tensor([[0.1, 0.2, 0.7]])]
    _, target, found = Mixup(mode="sample", generator=0)(
        torch.rand(2, 1, 8, 8), torch.arange(2), boxes=boxes, labels=labels
    )
    assert len(target) == 3 and [tuple(label.shape[1:]) for label in found.labels] == [(3,), (3,)]
    nothing = Mixup(generator=0)(torch.rand(2, 1, 8, 8), boxes=[torch.zeros(0, 4)] * 2)[1]
    assert [tuple(box.shape) for box in nothing.boxes] == [(0, 4), (0, 4)]


def test_boxes_in_evaluation_stay_as_they_are():
    boxes, labels = objects(5)
    found = Mixup(1.0, 1.0).eval()(torch.rand(5, 1, HEIGHT, WIDTH), boxes=boxes, labels=labels)[1]
    for i in range(5):
        assert same_bits(found.boxes[i], boxes[i]) and torch.equal(found.labels[i], labels[i])
        assert (found.lam[i] == 1).all()


def test_torchvision_boxes():
    tv_tensors = pytest.importorskip("torchvision.tv_tensors")
    options = {"canvas_size": (HEIGHT, WIDTH)}
    boxes, labels = objects(5)
    wrapped = [tv_tensors.BoundingBoxes(box, format="XYXY", **options) for box in boxes]
    draw = Mixup(0, 1.0, generator=0).draw(torch.rand(5, 1, HEIGHT, WIDTH))
    found, expected = (Mixup(0, 1.0).mix_boxes(given, draw, labels) for given in (wrapped, boxes))
    assert all(torch.equal(a, b) for a, b in zip(found.boxes, expected.boxes, strict=True))
    wrapped[1] = tv_tensors.BoundingBoxes(boxes[1], format="XYWH", **options)
    with pytest.raises(ValueError, match=r"^Mixup: boxes\[1\] must have the format XYXY, got XYWH"):
        Mixup(0, 1.0).mix_boxes(wrapped, draw, labels)


TWO = [torch.zeros(1, 4), torch.zeros(2, 4)]


@pytest.mark.parametrize(
    "boxes, labels, error, message",
    [
        (
            torch.zeros(2, 3, 4),
            None,
            ValueError,
            "boxes must be a list with a tensor for each of the 2 images, got T",
        ),
        (
            TWO[:1],
            None,
            ValueError,
            "boxes must be a list with a tensor for each of the 2 images, got 1 of them",
        ),
        (None, TWO, ValueError, "boxes must be a list .* got NoneType"),
        ([*TWO[:1], [[0, 0, 1, 1]]], None, TypeError, r"boxes\[1\] must be a tensor, got list"),
        ([*TWO[:1], torch.zeros(4)], None, ValueError, r"boxes\[1\] must have shape \(n, 4\), got \(4,\)"),
        ([torch.zeros(1, 4) > 0] * 2, None, TypeError, r"boxes\[0\] must be real numbers, got bool"),
        (
            [*TWO[:1], torch.zeros(1, 4).double()],
            None,
            TypeError,
            r"boxes\[1\] must be float32 as boxes\[0\] is",
        ),
        ([*TWO[:1], torch.zeros(1, 4, device="meta")], None, ValueError, r"boxes\[1\] must be on cpu as"),
        (
            TWO,
            torch.zeros(2),
            ValueError,
            "labels must be a list with a tensor for each of the 2 images, got Tensor",
        ),
        (
            TWO,
            [torch.zeros(1), torch.zeros(1)],
            ValueError,
            r"labels\[1\] must have shape \(2,\) with its boxes",
        ),
        (TWO, [torch.zeros(1, 2), torch.zeros(2)], ValueError, r"labels\[1\] must have shape \(2, 2\) with"),
        (
            TWO,
            [torch.zeros(1), torch.zeros(2, dtype=int)],
            TypeError,
            r"labels\[1\] must be float32 as labels\[0\]",
        ),
        (
            TWO,
            [torch.tensor(1), torch.zeros(2)],
            ValueError,
            r"labels\[0\] must have shape \(1,\) with its boxes",
        ),
    ],
)
def test_bad_boxes_are_refused_before_anything_is_written(boxes, labels, error, message):
    x = torch.rand(2, 1, 8, 8)
    before = x.clone()
    with pytest.raises(error, match=f"^Mixup: {message}"):
        Mixup(generator=0)(x, boxes=boxes, labels=labels)
    assert same_bits(x, before)
