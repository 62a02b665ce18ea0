"""One pretraining experiment: the same run with each loss, judged beside an encoder that was not trained."""

import copy
import dataclasses
import statistics

import torch

from ssl_kernels.recipes.checkpoints import History
from ssl_kernels.recipes.contention import Watch
from ssl_kernels.recipes.encoders import PatchTransformer, SmallConvNet, resnet18
from ssl_kernels.recipes.engine import Training, train
from ssl_kernels.recipes.evaluation import Accuracy, evaluate_features, extract_features
from ssl_kernels.recipes.memory import peak_memory
from ssl_kernels.recipes.methods import find_method
from ssl_kernels.recipes.ranks import ALONE
from ssl_kernels.recipes.views import Batch

LARGEST_SMALL_IMAGE = 64  # pixels a side, up to which ResNet-18 gets the CIFAR stem


@dataclasses.dataclass
class Run:
    """What was judged: raw pixels or an encoder, and its training if it had one.

    features: Of the held-out images, (N, F). peak_bytes: Of the loss, forward and backward; None where several
    processes trained, whose losses wait for each other.
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


def build_encoder(data, seed, method):
    """The encoder for `data` of the method called `method`, drawn from `seed` without touching torch's generator."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _encoder(data, find_method(method))


def _encoder(data, method):
    if method.transformer:
        return PatchTransformer(data.channels, data.image_size)
    if data.channels == 1:
        return SmallConvNet()
    return resnet18(small_images=data.image_size <= LARGEST_SMALL_IMAGE)


def build_method(data, settings):
    """The method that `settings` name, for `data`; its weights are drawn as `build_encoder` draws them.

    Raises:
        ValueError: It cannot be made with these options.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        method = find_method(settings.method)
        return method(_encoder(data, method), data, **settings.options)


def prepare_trainings(data, losses, settings, *, device="cpu", out=None, resume=False, ranks=ALONE):
    """A `Training` for each loss, all from the same weights, with what a checkpoint holds of it.

    Args:
        data: An `ImageData`.
        losses: dict from a run's name to a loss called as the method's `criterion`, or None for that.
        settings: `engine.Settings`.
        out: Folder (a pathlib.Path) of the checkpoints, one a run, or None.
        resume: Go on from these.
        ranks: The `Ranks` that train together.

    Returns:
        dict from a run's name to its `Training`.

    Raises:
        ValueError: A checkpoint cannot be used, or the method cannot be made.
    """
    trainings = {}
    for name, loss in losses.items():
        try:
            method = build_method(data, settings)
        except RuntimeError as error:
            if "queue_size" in settings.options:
                size = settings.options["queue_size"]
                raise ValueError(f"--queue-size must fit into memory, got {size}") from error
            raise _refused(settings, error) from error
        trainings[name] = training = Training(
            method,
            settings,
            settings.epochs * len(data.views),
            loss=loss,
            device=device,
            checkpoint=checkpoint_path(out, name) if out else None,
            ranks=ranks,
            images=data,
        )
        if resume and out and training.checkpoint.exists():
            training.load(len(data.views))
    return trainings


def rehearse(training, data):
    """A forward pass of a copy with four images of random numbers, in which a loss refuses options before the work.

    Raises:
        ValueError: It did.
    """
    method, settings = copy.deepcopy(training.method), training.settings
    with torch.random.fork_rng(devices=[]):
        whole, parts = (
            [torch.rand(4, data.channels, side, side) for _ in range(count)]
            for side, count in ((data.image_size, method.views), (data.image_size // 2, method.crops))
        )
        batch = Batch(whole, parts, torch.arange(4) % 2).to(training.device)
        try:
            with torch.compiler.set_stance("force_eager"):
                method(batch)
        except (ValueError, RuntimeError, ArithmeticError) as error:
            raise _refused(settings, error) from error


def _refused(settings, error):
    options = ", ".join(f"{name} = {value}" for name, value in settings.options.items()) or "none"
    reason = str(error).strip().splitlines()[0]
    return ValueError(f"--method {settings.method} must run with its options, got {options} ({reason})")


def run_experiment(data, trainings, settings, *, device="cpu"):
    """Judge what is there before training, then take all trainings to their end, step by step in turn, and judge them.

    Args:
        data: An `ImageData`.
        trainings: From `prepare_trainings`.
        settings: `engine.Settings`.

    Returns:
        (runs, contention): list of `Run`, which are raw pixels (of images in grey only: too many columns elsewhere),
        the untrained encoder, then the trained ones in the order of `trainings`; and a `Contention` of the training.
    """
    runs = []
    if data.channels == 1:
        runs.append(_judge("raw pixels", torch.nn.Flatten(), data))
    runs.append(
        _judge("untrained encoder", build_encoder(data, settings.seed, settings.method).to(device), data)
    )
    watch = Watch()
    train(list(trainings.values()), data.views, settings.method)
    contention = watch.read()
    for name, training in trainings.items():
        run = _judge(name, training.method.encoder, data)
        alone = training.ranks.size == 1
        peak_bytes = measure_loss_memory(training, next(data.views.epoch(0))) if alone else None
        runs.append(dataclasses.replace(run, history=training.history, peak_bytes=peak_bytes))
    return runs, contention


def checkpoint_path(out, name):
    """The checkpoint of the run called `name` in the folder `out`: plain.pt, ssl_kernels.pt."""
    return out / f"{name.split()[0]}.pt"


def measure_loss_memory(training, batch):
    """Peak bytes of the loss of a `Training`, forward and backward with the gradients, on the embeddings of a batch."""
    method = copy.deepcopy(training.method)
    timed = method.criterion
    peaks = []

    def measured(*args, **options):
        values = timed(*args, **options)  # the first call may set up what stays
        peaks.append(peak_memory(lambda: timed(*args, **options), training.device))
        return values

    method.criterion = measured
    with torch.random.fork_rng(devices=[]):
        method(batch.to(training.device))
    return max(peaks)


def _judge(name, encoder, data):
    train, test = (extract_features(encoder, batches) for batches in (data.train, data.test))
    return Run(name, evaluate_features(train, test), test[0])
