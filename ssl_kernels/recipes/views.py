"""Augmented views of every image, in batches, reproducible epoch by epoch.

What epoch e yields depends on the seed and on e alone, so two runs see the same views and a resumed run
goes on with those it would have seen. Both classes have `epoch(e, first=0)`, an iterator over `Batch` from batch
`first` on, and `len`, the batches of an epoch; the images that fill no batch differ by epoch.
"""

import contextlib
import signal
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Subset


class Batch(NamedTuple):
    """views: each (B, C, H, W). crops: smaller ones of the same images, each (B, C, h, w), for methods that ask for
    them. labels: (B,), for methods that are told them."""

    views: list[torch.Tensor]
    crops: list[torch.Tensor]
    labels: torch.Tensor

    def to(self, device, dtype=torch.float32):
        """On a device, its images in a dtype."""
        views, crops = ([images.to(device, dtype) for images in some] for some in (self.views, self.crops))
        return Batch(views, crops, self.labels.to(device))

    def rows(self, rows):
        """Those of a slice."""
        return self._each(lambda tensor: tensor[rows])

    def parts(self, count):
        """`count` batches of about equal size that together are this one."""
        size = len(self.labels)
        return [self.rows(slice(size * part // count, size * (part + 1) // count)) for part in range(count)]

    def _each(self, change):
        views, crops = ([change(tensor) for tensor in tensors] for tensors in (self.views, self.crops))
        return Batch(views, crops, change(self.labels))


class Augmentation(NamedTuple):
    """What is made of each image: `views` draws of `view`, and `crops` draws of `crop`."""

    view: object
    views: int = 2
    crop: object = None
    crops: int = 0

    def of(self, images):
        """(views, crops) of what the transforms take: lists of what they return."""
        return (
            [self.view(images) for _ in range(self.views)],
            [self.crop(images) for _ in range(self.crops)],
        )


def mix_seed(*numbers):
    """One seed from several numbers, such as (seed, epoch, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextlib.contextmanager
def seeded(*numbers):
    """Seed torch's CPU generator, which torchvision's transforms draw from, inside the block only."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(mix_seed(*numbers))
        yield


class BatchViews:
    """Views of images held in memory, (N, C, H, W) with labels (N,), transformed `group` images per call.

    A torchvision transform draws its parameters once per call. One call per image costs far more than the
    arithmetic when images are tiny; one per batch would give all of it the same shift and angle.
    """

    def __init__(self, images, labels, augmentation, batch_size, seed, group=16):
        self.images = images
        self.labels = labels
        self.batch_size = batch_size
        self.seed = seed
        self.augmentation = augmentation._replace(
            view=_grouped(augmentation.view, group), crop=_grouped(augmentation.crop, group)
        )

    def __len__(self):
        return len(self.images) // self.batch_size

    def subset(self, rows, batch_size, seed):
        """One view of each of these images, in batches of their own."""
        one = self.augmentation._replace(views=1, crops=0)
        views = BatchViews(self.images[rows], self.labels[rows], one, batch_size, seed)
        views.augmentation = one  # grouped already
        return views

    def epoch(self, epoch, first=0):
        shuffle = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        order = torch.randperm(len(self.images), generator=shuffle)
        for step in range(first, len(self)):
            chosen = order[step * self.batch_size : (step + 1) * self.batch_size]
            with seeded(self.seed, epoch, step):
                views, crops = self.augmentation.of(self.images[chosen])
            yield Batch(views, crops, self.labels[chosen])


def _grouped(transform, group):
    return lambda images: torch.cat([transform(some) for some in images.split(group)])


class DatasetViews:
    """Views of a torchvision dataset of (image, label), transformed one by one in DataLoader workers."""

    def __init__(self, dataset, augmentation, batch_size, seed, workers=0):
        self.dataset = dataset
        self.augmentation = augmentation
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers

    def __len__(self):
        return len(self.dataset) // self.batch_size

    @property
    def labels(self):
        dataset, rows = self.dataset, None
        if isinstance(dataset, Subset):
            dataset, rows = dataset.dataset, dataset.indices
        labels = torch.tensor(dataset.targets)
        return labels if rows is None else labels[rows]

    def subset(self, rows, batch_size, seed):
        """One view of each of these images, in batches of their own."""
        one = self.augmentation._replace(views=1, crops=0)
        return DatasetViews(Subset(self.dataset, rows.tolist()), one, batch_size, seed, self.workers)

    def epoch(self, epoch, first=0):
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        order = torch.randperm(len(self.dataset), generator=generator)
        batches = order[: len(self) * self.batch_size].view(-1, self.batch_size).tolist()
        return iter(
            DataLoader(
                _Augmented(self.dataset, self.augmentation, self.seed, epoch),
                batch_sampler=batches[first:],
                num_workers=self.workers,
                worker_init_fn=ignore_interrupts,
                generator=generator,
            )
        )


def ignore_interrupts(worker):
    """For a worker process: Ctrl-C reaches all processes of a terminal, and the main one decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Augmented(Dataset):
    def __init__(self, dataset, augmentation, seed, epoch):
        self.dataset = dataset
        self.augmentation = augmentation
        self.seed = seed
        self.epoch = epoch

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        # Seeded by image: the same whatever worker it falls to, and however many there are.
        with seeded(self.seed, self.epoch, index):
            views, crops = self.augmentation.of(image)
        return Batch(views, crops, label)
