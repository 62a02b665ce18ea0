"""Mixing in the workers of a DataLoader: each draws apart, and again the same. Spawned workers import this file."""

import pytest
import torch
from torch.utils.data import DataLoader

from ssl_kernels.nn import Mixup


class Collate:
    """The share of each batch, and who drew it."""

    def __init__(self, generator, used=False):
        self.mixup = Mixup(1.0, generator=generator)
        if used:
            self.mixup(torch.zeros(2, 1))

    def __call__(self, samples):
        torch.manual_seed(len(samples))  # a stream of its own must not depend on torch's
        return self.mixup.draw(torch.stack(samples)).lam[0]


def drawn_in_workers(collate, epochs=2, seed=0, **options):
    torch.manual_seed(seed)
    loader = DataLoader([torch.zeros(1)] * 12, batch_size=2, num_workers=2, collate_fn=collate, **options)
    return [[float(lam) for lam in loader] for _ in range(epochs)]


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("kind", ["seed", "used seed", "generator"])
def test_workers_draw_apart(kind, persistent):
    """Other numbers in each worker and epoch, the same again from the same seed of torch."""
    runs = []
    for seed in (0, 0, 1):
        collate = Collate(torch.Generator().manual_seed(5) if kind == "generator" else 5, kind == "used seed")
        runs.append(drawn_in_workers(collate, seed=seed, persistent_workers=persistent))
    assert runs[0] == runs[1]
    assert len({lam for run in runs[::2] for epoch in run for lam in epoch}) == 24


class Both:
    """Of a stream that was drawn from before."""

    def __init__(self):
        self.parts = Collate(5, True), Collate(torch.Generator().manual_seed(6), True)

    def __call__(self, samples):
        return torch.stack([part(samples) for part in self.parts])


def test_spawned_workers_draw_as_forked_ones():
    """The state gets there, and gives the same numbers."""
    runs = []
    for context in ("fork", "spawn", "forkserver"):
        torch.manual_seed(0)
        options = {"num_workers": 1, "multiprocessing_context": context, "collate_fn": Both()}
        runs.append(torch.cat(list(DataLoader([torch.zeros(1)] * 4, batch_size=2, **options))).tolist())
    assert runs[0] == runs[1] == runs[2]
    assert len(set(runs[0])) == 4


class TorchsOwn(Collate):
    def __call__(self, samples):
        return self.mixup.draw(torch.stack(samples)).lam[0]


def test_workers_without_a_generator_draw_from_torchs():
    runs = [drawn_in_workers(TorchsOwn(None), seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert len({lam for run in runs[::2] for epoch in run for lam in epoch}) == 24
