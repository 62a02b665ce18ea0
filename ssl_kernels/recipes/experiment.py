"""One pretraining experiment: the same run with each loss, judged beside an encoder that was not trained."""

import dataclasses
import statistics

import torch

from ssl_kernels.nn import MoCoQueue
from ssl_kernels.recipes import moco
from ssl_kernels.recipes.contention import Watch
from ssl_kernels.recipes.encoders import SimCLRModel, SmallConvNet, resnet18
from ssl_kernels.recipes.evaluation import Accuracy, evaluate_features, extract_features
from ssl_kernels.recipes.memory import peak_memory
from ssl_kernels.recipes.simclr import History, Training, train

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


def prepare_trainings(data, losses, settings, *, device="cpu", out=None, resume=False):
    """A `Training` for each loss, all from the same weights, with what a checkpoint holds of it.

    Args:
        data: An `ImageData`.
        losses: dict from a run's name to a function of both views' embeddings, for "moco" of queries, keys and
            the queue.
        settings: `simclr.Settings`.
        out: Folder (a pathlib.Path) of the checkpoints, one a run, or None.
        resume: Go on from these.

    Returns:
        dict from a run's name to its `Training`.

    Raises:
        ValueError: A checkpoint cannot be used, or the queue does not fit into memory.
    """
    trainings = {}
    for name, loss in losses.items():
        model = build_model(data, settings.seed)
        step = None
        if settings.method == "moco":
            try:
                model = moco.MoCoModel(model, PROJECTION_WIDTH, settings.queue_size, settings.momentum)
            except RuntimeError as error:
                raise ValueError(f"--queue-size must fit into memory, got {settings.queue_size}") from error
            step = moco.train_step
        checkpoint = checkpoint_path(out, name) if out else None
        trainings[name] = Training(model, loss, settings, step=step, device=device, checkpoint=checkpoint)
        if resume and checkpoint is not None and checkpoint.exists():
            trainings[name].load(len(data.views))
    return trainings


def run_experiment(data, trainings, settings, *, device="cpu"):
    """Judge what is there before training, then take all trainings to their end, step by step in turn, and judge them.

    Args:
        data: An `ImageData`.
        trainings: From `prepare_trainings`.
        settings: `simclr.Settings`.

    Returns:
        (runs, contention): list of `Run`, which are raw pixels (of digits only: too many columns elsewhere), the
        untrained encoder, then the trained ones in the order of `trainings`; and a `Contention` of the training.
    """
    runs = []
    if data.name == "digits":
        runs.append(_judge("raw pixels", torch.nn.Flatten(), data))
    runs.append(_judge("untrained encoder", build_model(data, settings.seed).encoder.to(device), data))
    peak_bytes = {
        name: measure_loss_memory(training.loss, settings, device) for name, training in trainings.items()
    }
    watch = Watch()
    train(list(trainings.values()), data.views)
    contention = watch.read()
    for name, training in trainings.items():
        run = _judge(name, training.model.encoder, data)
        runs.append(dataclasses.replace(run, history=training.history, peak_bytes=peak_bytes[name]))
    return runs, contention


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
