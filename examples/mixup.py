"""Supervised training with mixup and CutMix, mixed in place, and targets that are never made dense.

python examples/mixup.py --epochs 20
"""

import digits
import torch

from ssl_kernels import mixup_cross_entropy
from ssl_kernels.nn import Mixup


@torch.no_grad()
def accuracy(model, images, labels):
    return (model(images).argmax(1) == labels).float().mean().item()


def main(epochs):
    torch.manual_seed(0)
    train, test = digits.load()
    model = torch.nn.Sequential(digits.make_encoder(), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, switch_prob=0.3, mode="sample")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    before, losses = accuracy(model, *test), []
    for _ in range(epochs):
        for images, labels in digits.batches(*train, size=64):
            images, target = mixup(images, labels)
            loss = mixup_cross_entropy(model(images), *target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return digits.report(losses, before, accuracy(model, *test))


if __name__ == "__main__":
    main(digits.epochs(default=20))
