"""What the examples share: the digits of scikit-learn (no download), augmentation, an encoder, an accuracy."""

import argparse
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


def epochs(default):
    """The value of `--epochs`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=default, help="passes over the digits (%(default)s)")
    return parser.parse_args().epochs


def load(held_out=450):
    """(images, labels) to train on and (images, labels) held out, images (N, 1, 8, 8) in [0, 1]."""
    data = load_digits()
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None] / 16
    labels = torch.tensor(data.target)[order]
    return (images[held_out:], labels[held_out:]), (images[:held_out], labels[:held_out])


def augment(images):
    """Each image turned, scaled and shifted at random."""
    n = len(images)
    angle, zoom = 0.25 * torch.randn(n), 1 + 0.15 * torch.randn(n)
    turned = torch.stack((angle.cos(), -angle.sin(), angle.sin(), angle.cos()), 1).view(n, 2, 2)
    transform = torch.cat((turned * zoom[:, None, None], 0.15 * torch.randn(n, 2, 1)), 2).to(images)
    grid = F.affine_grid(transform, images.shape, align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def make_encoder(width=64):
    """(B, 1, 8, 8) to (B, width)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 16, width),
    )


def batches(images, labels, size=256):
    """A new random order at each call; the last images that fill no batch are left out."""
    for rows in torch.randperm(len(images)).split(size):
        if len(rows) == size:
            yield images[rows], labels[rows]


@torch.no_grad()
def few_label_accuracy(encoder, train, test, labelled=50):
    """The share of held-out digits that have the label of the nearest, by cosine, of the first training digits."""
    known, unknown = (F.normalize(encoder(images)) for images in (train[0][:labelled], test[0]))
    return (train[1][(unknown @ known.T).argmax(1)] == test[1]).float().mean().item()


def report(losses, before, after):
    """Prints what training did, and returns it."""
    assert all(map(math.isfinite, losses)), losses
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, accuracy {before:.1%} -> {after:.1%}")
    return {"losses": losses, "before": before, "after": after}
