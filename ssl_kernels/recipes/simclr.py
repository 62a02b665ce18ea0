"""SimCLR pretraining: two views of each image, one encoder, a contrastive loss.

Source: Chen et al., arXiv:2002.05709.
"""

import dataclasses
import math
import pathlib
import time

import torch
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Settings:
    data: str
    epochs: int
    batch_size: int
    temperature: float
    learning_rate: float
    weight_decay: float = 1e-4
    warmup: float = 0.05  # part of the steps over which the learning rate rises
    seed: int = 0
    method: str = "simclr"  # or "moco", which has a queue and the momentum of its key encoder
    queue_size: int | None = None
    momentum: float | None = None


@dataclasses.dataclass
class History:
    """losses, loss_seconds: of every step, the latter forward and backward of the loss alone.
    seconds: Of the whole training."""

    losses: list = dataclasses.field(default_factory=list)
    loss_seconds: list = dataclasses.field(default_factory=list)
    seconds: float = 0.0


def pretrain(
    model,
    loss,
    views,
    settings,
    *,
    step=None,
    device="cpu",
    checkpoint=None,
    resume=False,
    title="pretrain",
):
    """Train `model` in place and return its `History`.

    Args:
        model: Images (B, C, H, W) to embeddings (B, D), such as `SimCLRModel`; moved to `device`.
        loss: Called with the embeddings of both views, (B, D) each; returns a scalar.
        views: `BatchViews` or `DatasetViews`.
        settings: A `Settings`.
        step: One update, called as `train_step` (the default) is.
        checkpoint: File written after every epoch, or None.
        resume: Go on from `checkpoint` where the file exists. The views and the learning rate depend on the
            epoch alone, so the run ends as it would have without the break.

    Raises:
        ValueError: The checkpoint comes from a run with other settings.
    """
    step = step or train_step
    model.to(device, memory_format=torch.channels_last).train()
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    history = History()
    first_epoch = 0
    if resume and checkpoint is not None and pathlib.Path(checkpoint).exists():
        first_epoch, history = load_checkpoint(checkpoint, model, optimizer, settings)

    steps = settings.epochs * len(views)
    progress = tqdm(total=steps, initial=first_epoch * len(views), desc=title, unit="step", disable=None)
    for epoch in range(first_epoch, settings.epochs):
        start = time.perf_counter()
        for view0, view1 in views.epoch(epoch):
            set_learning_rate(optimizer, settings, len(history.losses), steps)
            value, seconds = step(model, loss, optimizer, view0.to(device), view1.to(device))
            history.losses.append(value)
            history.loss_seconds.append(seconds)
            progress.set_postfix(loss=f"{value:.4f}", refresh=False)
            progress.update()
        history.seconds += time.perf_counter() - start
        if checkpoint is not None:
            save_checkpoint(checkpoint, epoch + 1, model, optimizer, settings, history)
    progress.close()
    return history


def train_step(model, loss, optimizer, view0, view1):
    """One update; returns (loss, seconds in the loss).

    The loss is differentiated by itself and its gradient handed to the model, so that its time can be read.
    """
    embeddings = model(torch.cat([view0, view1])).chunk(2)
    z0, z1 = (view.detach().requires_grad_() for view in embeddings)
    start = read_clock(z0.device)
    value = loss(z0, z1)
    value.backward()
    seconds = read_clock(z0.device) - start

    optimizer.zero_grad()
    torch.autograd.backward(embeddings, (z0.grad, z1.grad))
    optimizer.step()
    return value.item(), seconds


def read_clock(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def set_learning_rate(optimizer, settings, step, steps):
    """A linear rise, then half a cosine to zero."""
    rise = min(1.0, (step + 1) / (settings.warmup * steps + 1))
    fall = 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = settings.learning_rate * rise * fall


def save_checkpoint(path, epoch, model, optimizer, settings, history):
    state = {
        "epoch": epoch,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "settings": dataclasses.asdict(settings),
        "history": dataclasses.asdict(history),
    }
    # Written aside and moved, so that a break in between leaves the last one whole.
    path = pathlib.Path(path)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def read_checkpoint(path, settings):
    """What `save_checkpoint` wrote.

    Raises:
        ValueError: It comes from a run with other settings.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, value in dataclasses.asdict(settings).items():
        saved = state["settings"].get(name)
        if saved != value:
            raise ValueError(f"--resume: {name} must be {saved} as in {path}, got {value}")
    return state


def load_checkpoint(path, model, optimizer, settings):
    """Restore model and optimizer; returns (epochs done, history)."""
    state = read_checkpoint(path, settings)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"], History(**state["history"])
