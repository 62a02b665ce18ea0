"""One pretraining experiment: the same run with each loss, judged beside an encoder that was not trained."""

import dataclasses
import statistics

import torch

from ssl_kernels.nn import MoCoQueue
from ssl_kernels.recipes import moco
from ssl_kernels.recipes.encoders import SimCLRModel, SmallConvNet, resnet18
from ssl_kernels.recipes.evaluation import Accuracy, evaluate_features, extract_features
from ssl_kernels.recipes.memory import peak_memory
from ssl_kernels.recipes.simclr import History, pretrain

LARGEST_SMALL_IMAGE = 64  # pixels a side, up to which ResNet-18 gets the CIFAR stem
PROJECTION_WIDTH = 128


@dataclasses.dataclass
class Run:
    """What was judged: raw pixels or an encoder, and its training if it had one.

    features: Of the held-out images, (N, F). peak_bytes: Of the loss, forward and backward.
    """

    name: str
    accuracy: Accuracy
    features: torch.Tensor
    history: History | None = None
    peak_bytes: int | None = None

    @property
    def final_loss(self):
        """Mean over the last twentieth of the steps: a single step is as noisy as its batch."""
        losses = self.history.losses
        return statistics.fmean(losses[-max(1, len(losses) // 20) :])


def build_model(data, seed):
    """The model for `data`, its weights drawn from `seed` without touching torch's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if data.name == "digits":
            encoder = SmallConvNet()
        else:
            encoder = resnet18(small_images=data.image_size <= LARGEST_SMALL_IMAGE)
        return SimCLRModel(encoder, PROJECTION_WIDTH)


def run_experiment(data, losses, settings, *, device="cpu", out=None, resume=False):
    """Judge what is there before training, then train once with each loss from the same weights and views.

    Args:
        data: An `ImageData`.
        losses: dict from a run's name to a function of both views' embeddings, for "moco" of queries, keys and
            the queue.
        settings: `simclr.Settings`.
        out: Folder (a pathlib.Path) of the checkpoints, one a run, or None.
        resume: Go on from these.

    Returns:
        list of `Run`: raw pixels (of digits only: too many columns elsewhere), the untrained encoder, then
        the trained ones in the order of `losses`.
    """
    runs = []
    if data.name == "digits":
        runs.append(_judge("raw pixels", torch.nn.Flatten(), data))
    runs.append(_judge("untrained encoder", build_model(data, settings.seed).encoder.to(device), data))
    for name, loss in losses.items():
        model = build_model(data, settings.seed)
        step = None
        if settings.method == "moco":
            model = moco.MoCoModel(model, PROJECTION_WIDTH, settings.queue_size, settings.momentum)
            step = moco.train_step
        peak_bytes = measure_loss_memory(loss, settings, device)
        checkpoint = checkpoint_path(out, name) if out else None
        history = pretrain(
            model,
            loss,
            data.views,
            settings,
            step=step,
            device=device,
            checkpoint=checkpoint,
            resume=resume,
            title=name,
        )
        run = _judge(name, model.encoder, data)
        runs.append(dataclasses.replace(run, history=history, peak_bytes=peak_bytes))
    return runs


def checkpoint_path(out, name):
    """The checkpoint of the run called `name` in the folder `out`: plain.pt, ssl_kernels.pt."""
    return out / f"{name.split()[0]}.pt"


def measure_loss_memory(loss, settings, device):
    """Peak bytes of `loss`, forward and backward with the gradients, on embeddings like those of a batch."""
    generator = torch.Generator().manual_seed(0)
    views = torch.randn(2, settings.batch_size, PROJECTION_WIDTH, generator=generator).to(device)
    if settings.method == "moco":
        queue = MoCoQueue(settings.queue_size, PROJECTION_WIDTH, device=device)
        queue.push_(torch.randn(settings.queue_size, PROJECTION_WIDTH, generator=generator).to(device))

    def forward_and_backward():
        if settings.method == "moco":
            queries = torch.cat(tuple(views)).requires_grad_()
            loss(queries, torch.cat(tuple(views)), queue).backward()
        else:
            z0, z1 = (view.detach().requires_grad_() for view in views)
            loss(z0, z1).backward()

    forward_and_backward()  # the first call may set up what stays
    return peak_memory(forward_and_backward, device)


def _judge(name, encoder, data):
    train, test = (extract_features(encoder, batches) for batches in (data.train, data.test))
    return Run(name, evaluate_features(train, test), test[0])
