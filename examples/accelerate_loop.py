"""Supervised contrastive training with accelerate; `accelerate launch` runs it on any number of devices.

pip install accelerate
python examples/accelerate_loop.py --epochs 60
accelerate launch examples/accelerate_loop.py --epochs 60
"""

import digits
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

import ssl_kernels
from ssl_kernels import distributed


def main(epochs, **options):
    accelerator = Accelerator(**options)
    set_seed(0)
    train, test = digits.load()
    encoder = digits.make_encoder()
    before = digits.few_label_accuracy(encoder, train, test)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
    loader = DataLoader(TensorDataset(*train), batch_size=256, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(encoder, optimizer, loader)

    # On several processes each has its own rows, and the loss is that of all of them.
    sup_con_loss = (distributed if accelerator.num_processes > 1 else ssl_kernels).sup_con_loss
    losses = []
    for _ in range(epochs):
        for images, labels in loader:
            views = torch.cat([digits.augment(images) for _ in range(2)])
            loss = sup_con_loss(model(views), labels.repeat(2), temperature=0.2)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    after = digits.few_label_accuracy(accelerator.unwrap_model(model).cpu(), train, test)
    if accelerator.is_main_process:
        return digits.report(losses, before, after)


if __name__ == "__main__":
    main(digits.epochs(default=60))
