"""SimCLR in plain PyTorch: two views of each digit, and NT-Xent between them.

python examples/simclr.py --epochs 60
"""

import digits
import torch

from ssl_kernels import nt_xent_loss


def main(epochs):
    torch.manual_seed(0)
    train, test = digits.load()
    encoder = digits.make_encoder()
    projector = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(64, 32))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *projector.parameters()], lr=2e-3)

    before, losses = digits.few_label_accuracy(encoder, train, test), []
    for _ in range(epochs):
        for images, _ in digits.batches(*train):
            z0, z1 = (projector(encoder(digits.augment(images))) for _ in range(2))
            loss = nt_xent_loss(z0, z1, temperature=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    return digits.report(losses, before, digits.few_label_accuracy(encoder, train, test))


if __name__ == "__main__":
    main(digits.epochs(default=60))
