"""Tiny image sets on disk, in the layouts of torchvision's ImageFolder and CIFAR10."""

import hashlib
import pickle

import numpy as np
from PIL import Image
from torchvision import datasets

CLASSES = ("dark", "grey", "light")


def random_image(random, label):
    """(32, 32, 3) uint8, the brighter the higher the label."""
    return random.integers(60 * label, 60 * label + 90, (32, 32, 3), dtype=np.uint8)


def write_folder(root, images_per_class=8):
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for index in range(images_per_class):
            Image.fromarray(random_image(random, label)).save(root / name / f"{index}.png")


def write_cifar10(root, monkeypatch, images_per_file=9):
    """Files as those of CIFAR-10, whose checksums torchvision is told to expect."""
    random = np.random.default_rng(0)
    base = root / datasets.CIFAR10.base_folder
    base.mkdir(parents=True)

    def write(name, content):
        encoded = pickle.dumps(content)
        (base / name).write_bytes(encoded)
        return hashlib.md5(encoded).hexdigest()

    def batch():
        labels = [index % len(CLASSES) for index in range(images_per_file)]
        images = np.stack([random_image(random, label).transpose(2, 0, 1).ravel() for label in labels])
        return {"data": images, "labels": labels}

    train = [[name, write(name, batch())] for name, _ in datasets.CIFAR10.train_list]
    test = [[name, write(name, batch())] for name, _ in datasets.CIFAR10.test_list]
    checksum = write("batches.meta", {"label_names": list(CLASSES)})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test)
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": checksum})
