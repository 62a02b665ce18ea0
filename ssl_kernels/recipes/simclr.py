"""SimCLR pretraining: two views of each image, one encoder, a contrastive loss.

Source: Chen et al., arXiv:2002.05709.
"""

import contextlib
import copy
import dataclasses
import io
import math
import pathlib
import signal
import threading
import time
import warnings

import torch
from tqdm import tqdm

from ssl_kernels.recipes.files import write_whole
from ssl_kernels.recipes.views import mix_seed


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
    """Of every step: its loss, the seconds in forward and backward of the loss alone, and those of the whole step with
    the making of its views."""

    losses: list = dataclasses.field(default_factory=list)
    loss_seconds: list = dataclasses.field(default_factory=list)
    step_seconds: list = dataclasses.field(default_factory=list)

    @property
    def seconds(self):
        return sum(self.step_seconds)


class Diverged(Exception):
    """The loss is no longer a finite number."""


class Training:
    """A model, its loss and optimizer, and how far they have come.

    What a step draws from torch's generators comes from a stream of its own, seeded by `settings.seed`: steps of
    several trainings may alternate, and each ends as it would alone.

    Args:
        model: Images (B, C, H, W) to embeddings (B, D), such as `SimCLRModel`; moved to `device`.
        loss: Called with the embeddings of both views, (B, D) each; returns a scalar.
        settings: A `Settings`.
        step: One update, called as `train_step` (the default) is.
        checkpoint: File written after every epoch and at an interruption, or None.
    """

    def __init__(self, model, loss, settings, *, step=None, device="cpu", checkpoint=None):
        self.model = model.to(device, memory_format=torch.channels_last).train()
        self.loss = loss
        self.settings = settings
        self.device = torch.device(device)
        self.checkpoint = pathlib.Path(checkpoint) if checkpoint is not None else None
        learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            learned, lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.history = History()
        self.epoch, self.batch = 0, 0  # where the next step is
        self._update = step or train_step
        self._is_whole = True  # false in the middle of a step
        self._written_here = False
        self._begun = None  # the checkpoint of where this process began, until it has written another
        kinds = {"cpu": "cpu", **({"cuda": self.device} if self.device.type == "cuda" else {})}
        self._random = {
            kind: torch.Generator(device).manual_seed(mix_seed(settings.seed, 1)).get_state()
            for kind, device in kinds.items()
        }

    @property
    def bytes_of_checkpoint(self):
        """About: the model with two moments of every parameter."""
        tensors = [*self.model.parameters(), *self.model.parameters(), *self.model.state_dict().values()]
        return sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))

    def step(self, view0, view1, batches, views_seconds=0.0):
        """One update, of `batches` an epoch."""
        start = time.perf_counter()
        self._is_whole = False
        steps = self.settings.epochs * batches
        set_learning_rate(self.optimizer, self.settings, len(self.history.losses), steps)
        views = view0.to(self.device), view1.to(self.device)
        with self._own_random_numbers():
            value, seconds = self._update(self.model, self.loss, self.optimizer, *views)
        if not math.isfinite(value):
            raise Diverged(
                f"the loss is {value} at step {len(self.history.losses) + 1}: a lower --learning-rate may help"
            )
        self.history.losses.append(value)
        self.history.loss_seconds.append(seconds)
        self.history.step_seconds.append(time.perf_counter() - start + views_seconds)
        self.epoch, self.batch = divmod(len(self.history.losses), batches)
        self._is_whole = True

    @contextlib.contextmanager
    def _own_random_numbers(self):
        on_gpu = "cuda" in self._random
        with torch.random.fork_rng(devices=[self.device] if on_gpu else []):
            torch.set_rng_state(self._random["cpu"])
            if on_gpu:
                torch.cuda.set_rng_state(self._random["cuda"], self.device)
            yield
            self._random["cpu"] = torch.get_rng_state()
            if on_gpu:
                self._random["cuda"] = torch.cuda.get_rng_state(self.device)

    def begin(self):
        """Before the first step of this process."""
        if self.checkpoint is not None and not self._written_here:
            self._begun = self._encode()

    def save(self):
        """Write the checkpoint, if there is to be one."""
        if self.checkpoint is not None:
            self._write(self._encode())

    def save_what_is_whole(self):
        """As `save`; in the middle of a step what was whole before: of the last epoch, or of the beginning."""
        if self._is_whole:
            self.save()
        elif self._begun is not None:
            self._write(self._begun)

    def _write(self, content):
        write_whole(self.checkpoint, content)
        self._written_here, self._begun = True, None

    def _encode(self):
        state = {
            "epoch": self.epoch,
            "batch": self.batch,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "random": self._random,
            "settings": dataclasses.asdict(self.settings),
            "history": dataclasses.asdict(self.history),
        }
        content = io.BytesIO()
        torch.save(state, content)
        return content.getvalue()

    def load(self, batches):
        """Go on from the checkpoint, of a run with `batches` an epoch; nothing changes where it cannot be used.

        Raises:
            ValueError: It is none, or comes from a run with other settings or another model.
            OSError: It cannot be read.
        """
        path = self.checkpoint
        state = read_checkpoint(path, self.settings)
        history, epoch, batch = state["history"], state["epoch"], state["batch"]
        steps = epoch * batches + batch
        if not (batch < batches and steps == len(history.losses) and epoch <= self.settings.epochs):
            raise ValueError(
                f"--resume: {path} must come from a run of {batches} steps an epoch, got {len(history.losses)} steps"
                f" in {epoch} epochs"
            )
        before = copy.deepcopy(self.model.state_dict())
        try:
            self._check_optimizer(state["optimizer"])
            random = {kind: state["random"].get(kind, own) for kind, own in self._random.items()}
            for kind, generator_state in random.items():
                torch.Generator(kind).set_state(generator_state)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except Exception as error:  # whatever a foreign file leads to
            self.model.load_state_dict(before)
            raise ValueError(f"--resume: {path} must hold the model of this run, got another") from error
        self.history, self.epoch, self.batch, self._random = history, epoch, batch, random

    def _check_optimizer(self, state):
        (group,) = self.optimizer.param_groups
        (saved,) = state["param_groups"]
        for index, parameter in zip(saved["params"], group["params"], strict=True):
            for name, value in state["state"].get(index, {}).items():
                if name != "step" and value.shape != parameter.shape:
                    raise ValueError(name)


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
        model, loss, settings, step, device, checkpoint: See `Training`.
        views: `BatchViews` or `DatasetViews`.
        resume: Go on from `checkpoint` where the file exists: the run ends as it would have without the break.

    Raises:
        ValueError: The checkpoint is none, or comes from a run with other settings.
        Diverged: The loss is not finite.
    """
    training = Training(model, loss, settings, step=step, device=device, checkpoint=checkpoint)
    if resume and checkpoint is not None and training.checkpoint.exists():
        training.load(len(views))
    train([training], views, title)
    return training.history


def train(trainings, views, title="pretrain"):
    """Take every training to its end, all on the same views, step by step in turn: what else happens on the machine
    falls on all alike. Each ends as it would alone.

    An interrupt from the keyboard is held back to the end of the step; checkpoints are written before it is raised.
    """
    epochs = trainings[0].settings.epochs
    steps = epochs * len(views) * len(trainings)
    done = sum(len(training.history.losses) for training in trainings)
    progress = tqdm(total=steps, initial=done, desc=title, unit="step", disable=None)
    for training in trainings:
        training.begin()
    try:
        with progress, _held_back_interrupt() as is_interrupted:
            for epoch in range(min(training.epoch for training in trainings), epochs):
                waiting = [training for training in trainings if training.epoch == epoch]
                first = min(training.batch for training in waiting)
                batches = views.epoch(epoch, first)
                for batch in range(first, len(views)):
                    start = time.perf_counter()
                    view0, view1 = next(batches)
                    views_seconds = time.perf_counter() - start
                    ready = [training for training in waiting if training.batch == batch]
                    # Each goes first as often as the others: the second finds the views in the cache.
                    for training in ready if (epoch + batch) % 2 else ready[::-1]:
                        training.step(view0, view1, len(views), views_seconds)
                        progress.set_postfix(loss=f"{training.history.losses[-1]:.4f}", refresh=False)
                        progress.update()
                    if is_interrupted() and batch + 1 < len(views):
                        raise KeyboardInterrupt
                for training in waiting:
                    training.save()
                if is_interrupted():
                    raise KeyboardInterrupt
    except KeyboardInterrupt:
        for training in trainings:
            training.save_what_is_whole()
        raise


@contextlib.contextmanager
def _held_back_interrupt():
    """Gives a function that tells whether Ctrl-C was pressed inside the block; pressed again, it interrupts at once."""
    pressed = False

    def note(signal_number, frame):
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    # Elsewhere the signal is not ours to take.
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


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


def read_checkpoint(path, settings):
    """What a `Training` wrote, with a `History`.

    Raises:
        ValueError: It is no checkpoint, or comes from a run with other settings.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        content = io.BytesIO(file.read())
    foreign = f"--resume: {path} must be a checkpoint of this command, got another file"
    try:
        with warnings.catch_warnings(action="ignore"):  # about files that are refused below
            state = dict(torch.load(content, map_location="cpu", weights_only=True))
        saved = state["settings"]
        history = {name: state["history"][name] for name in ("losses", "loss_seconds")}
        count = len(history["losses"])
        # Checkpoints of earlier versions know whole epochs and their seconds.
        history["step_seconds"] = state["history"].get("step_seconds") or [
            state["history"]["seconds"] / count for _ in range(count)
        ]
        state["batch"], state["random"] = state.get("batch", 0), state.get("random", {})
        is_ours = (
            all(isinstance(state[name], dict) for name in ("settings", "model", "optimizer", "random"))
            and all(type(state[name]) is int and state[name] >= 0 for name in ("epoch", "batch"))
            and all(len(values) == count for values in history.values())
            and all(type(value) is float for values in history.values() for value in values)
        )
    except Exception as error:  # a file of any content, which may fail anywhere
        raise ValueError(foreign) from error
    if not is_ours:
        raise ValueError(foreign)
    for name, value in dataclasses.asdict(settings).items():
        if saved.get(name) != value:
            raise ValueError(f"--resume: {name} must be {saved.get(name)} as in {path}, got {value}")
    return state | {"history": History(**history)}
