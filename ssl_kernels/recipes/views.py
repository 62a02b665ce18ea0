"""Two augmented views of every image, in batches, reproducible epoch by epoch.

What epoch e yields depends on the seed and on e alone, so two runs see the same views and a resumed run
goes on with those it would have seen. Both classes have `epoch(e, first=0)`, an iterator over (view0, view1), each
(B, C, H, W), from batch `first` on, and `len`, the batches of an epoch; the images that fill no batch differ by epoch.
"""

import contextlib
import signal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


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
    """Views of images held in memory, (N, C, H, W), transformed `group` images a call.

    A torchvision transform draws its parameters once a call. One call an image costs far more than the
    arithmetic when images are tiny; one a batch would give all of it the same shift and angle.
    """

    def __init__(self, images, transform, batch_size, seed, group=16):
        self.images = images
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.group = group

    def __len__(self):
        return len(self.images) // self.batch_size

    def epoch(self, epoch, first=0):
        shuffle = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        order = torch.randperm(len(self.images), generator=shuffle)
        for step in range(first, len(self)):
            batch = self.images[order[step * self.batch_size : (step + 1) * self.batch_size]]
            with seeded(self.seed, epoch, step):
                views = self._view(batch), self._view(batch)
            yield views

    def _view(self, batch):
        return torch.cat([self.transform(group) for group in batch.split(self.group)])


class DatasetViews:
    """Views of a torchvision dataset of (image, label), transformed one by one in DataLoader workers."""

    def __init__(self, dataset, transform, batch_size, seed, workers=0):
        self.dataset = dataset
        self.transform = transform
        self.batch_size = batch_size
        self.seed = seed
        self.workers = workers

    def __len__(self):
        return len(self.dataset) // self.batch_size

    def epoch(self, epoch, first=0):
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch))
        order = torch.randperm(len(self.dataset), generator=generator)
        batches = order[: len(self) * self.batch_size].view(-1, self.batch_size).tolist()
        return iter(
            DataLoader(
                _TwoViews(self.dataset, self.transform, self.seed, epoch),
                batch_sampler=batches[first:],
                num_workers=self.workers,
                worker_init_fn=ignore_interrupts,
                generator=generator,
            )
        )


def ignore_interrupts(worker):
    """For a worker process: Ctrl-C reaches all processes of a terminal, and the main one decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _TwoViews(Dataset):
    def __init__(self, dataset, transform, seed, epoch):
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.epoch = epoch

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, _ = self.dataset[index]
        # Seeded by image: the same whatever worker it falls to, and however many there are.
        with seeded(self.seed, self.epoch, index):
            return self.transform(image), self.transform(image)
