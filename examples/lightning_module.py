"""SimCLR as a Lightning module; on several devices the loss is that of the global batch.

pip install lightning
python examples/lightning_module.py --epochs 60
"""

import digits
import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

import ssl_kernels
from ssl_kernels import distributed


class SimCLR(lightning.LightningModule):
    def __init__(self, temperature=0.2):
        super().__init__()
        self.encoder = digits.make_encoder()
        self.projector = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(64, 32))
        self.temperature = temperature
        self.losses = []

    def training_step(self, batch, _):
        (images,) = batch
        z0, z1 = (self.projector(self.encoder(digits.augment(images))) for _ in range(2))
        losses = distributed if self.trainer.world_size > 1 else ssl_kernels
        loss = losses.nt_xent_loss(z0, z1, self.temperature)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(epochs, **options):
    lightning.seed_everything(0, verbose=False)
    train, test = digits.load()
    model = SimCLR()
    before = digits.few_label_accuracy(model.encoder, train, test)
    loader = DataLoader(TensorDataset(train[0]), batch_size=256, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(max_epochs=epochs, logger=False, enable_checkpointing=False, **options)
    trainer.fit(model, loader)
    after = digits.few_label_accuracy(model.cpu().encoder, train, test)
    return digits.report(model.losses, before, after)


if __name__ == "__main__":
    main(digits.epochs(default=60))
