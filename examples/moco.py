"""MoCo v2: a momentum encoder makes the keys, and a queue of earlier keys gives the negatives.

python examples/moco.py --epochs 60
"""

import digits
import torch

from ssl_kernels import moco_loss
from ssl_kernels.nn import MoCoQueue, MomentumEncoder


def main(epochs):
    torch.manual_seed(0)
    train, test = digits.load()
    encoder = digits.make_encoder()
    model = torch.nn.Sequential(encoder, torch.nn.ReLU(), torch.nn.Linear(64, 32))
    key_model = MomentumEncoder(model, momentum=0.98)
    queue = MoCoQueue(size=1024, dim=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    with torch.no_grad():  # a full queue from the first step on, so that the losses of all steps compare
        queue.push_(key_model(digits.augment(train[0])))
    before, losses = digits.few_label_accuracy(encoder, train, test), []
    for _ in range(epochs):
        for images, _ in digits.batches(*train):
            queries = model(digits.augment(images))
            with torch.no_grad():
                keys = key_model(digits.augment(images))
            loss = moco_loss(queries, keys, queue, temperature=0.2)
            queue.push_(keys)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            key_model.update_(model)
        losses.append(loss.item())
    return digits.report(losses, before, digits.few_label_accuracy(encoder, train, test))


if __name__ == "__main__":
    main(digits.epochs(default=60))
