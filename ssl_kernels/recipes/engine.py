"""The training loop of every recipe: steps, schedule, logs, checkpoints with exact resume, several processes."""

import contextlib
import copy
import dataclasses
import logging
import math
import pathlib
import signal
import threading
import time
import warnings

import torch
from torch import nn
from tqdm import tqdm

from ssl_kernels.recipes.checkpoints import History, check_settings, encode, read_checkpoint
from ssl_kernels.recipes.collapse import Health, Watch, for_so_many, measure_health
from ssl_kernels.recipes.files import write_whole
from ssl_kernels.recipes.logs import write_csv
from ssl_kernels.recipes.optimizers import make_optimizer, make_schedule
from ssl_kernels.recipes.ranks import ALONE
from ssl_kernels.recipes.timing import TimedLoss
from ssl_kernels.recipes.views import mix_seed

SHAPE = ("channels", "image_size", "classes")  # of an `ImageData`
log = logging.getLogger("ssl_kernels.recipes")


@dataclasses.dataclass(frozen=True)
class Settings:
    """options: Those of the method, such as its temperature, by name."""

    method: str
    data: str
    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str = "adamw"  # or "sgd", "lars"
    weight_decay: float = 1e-4
    warmup: float = 0.05  # part of the steps over which the learning rate rises
    precision: str = "float32"  # or "bfloat16", by autocast
    accumulate: int = 1  # parts of a batch that are computed one after the other
    compile: bool = False
    seed: int = 0
    image_size: int | None = None
    options: dict = dataclasses.field(default_factory=dict)

    def as_dict(self):
        """All in one dictionary of plain values."""
        values = dataclasses.asdict(self)
        return values | values.pop("options")


class Diverged(Exception):
    """The loss is no longer a finite number."""


class Training:
    """A method, its optimizer and schedule, and how far they have come.

    What a step draws from torch's generators comes from a stream of its own, seeded by `settings.seed`: steps of
    several trainings may alternate, and each ends as it would alone. Several ranks draw alike.

    Args:
        method: A `methods.Method`; moved to `device`. Views are given to it in the dtype of its parameters.
        settings: A `Settings`.
        steps: Of the whole training.
        loss: Instead of the method's own `criterion`.
        checkpoint: File written after every epoch and at an interruption, or None; beside it goes the log, with the
            ending .csv.
        board: A `logs.TensorBoard`, or None.
        ranks: The `Ranks` that train together. Each passes the same batches.
        images: The `ImageData`, whose shape a checkpoint notes, or None.
    """

    def __init__(
        self,
        method,
        settings,
        steps,
        *,
        loss=None,
        device="cpu",
        checkpoint=None,
        board=None,
        ranks=ALONE,
        images=None,
    ):
        self.method = method.to(device, memory_format=torch.channels_last).train()
        self.method.criterion = TimedLoss(loss or method.criterion)
        self.settings = settings
        self.steps = steps
        self.device = torch.device(device)
        self.checkpoint = pathlib.Path(checkpoint) if checkpoint is not None else None
        self.board = board
        self.ranks = ranks
        self._shape = {name: getattr(images, name) for name in SHAPE} if images is not None else {}
        learned = [parameter for parameter in method.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(learned, settings)
        self.schedule = make_schedule(self.optimizer, settings.warmup, steps)
        self.history = History()
        self.epoch, self.batch = 0, 0  # where the next step is
        self._dtype = learned[0].dtype
        self._watch = Watch(method.watched)
        self._is_whole = True  # false in the middle of a step
        self._written_here = False
        self._begun = None  # the checkpoint of where this process began, until it has written another
        self._forward = method
        if settings.compile:
            method.encoder.compile()
        if ranks.size > 1:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                # torch 2.14 names the successor of this argument, which older versions do not have.
                self._forward = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
        kinds = {"cpu": "cpu", **({"cuda": self.device} if self.device.type == "cuda" else {})}
        self._random = {
            kind: torch.Generator(device).manual_seed(mix_seed(settings.seed, 1)).get_state()
            for kind, device in kinds.items()
        }

    @property
    def bytes_of_checkpoint(self):
        """About: the model with two moments of every parameter."""
        tensors = [*self.method.parameters(), *self.method.parameters(), *self.method.state_dict().values()]
        return sum(tensor.nbytes for tensor in tensors if torch.is_tensor(tensor))

    def step(self, batch, batches, views_seconds=0.0):
        """One update, of `batches` an epoch."""
        start = time.perf_counter()
        self._is_whole = False
        self.method.criterion.seconds = 0.0
        rate = self.optimizer.param_groups[0]["lr"]
        batch = self.ranks.own(batch).to(self.device, self._dtype)
        with self._own_random_numbers():
            value = self.ranks.mean(self._update(batch))
        if not math.isfinite(value):
            raise Diverged(
                f"the loss is {value} at step {len(self.history.losses) + 1}: a lower --learning-rate may help"
            )
        self.history.losses.append(value)
        self.history.rates.append(float(rate))
        self.history.loss_seconds.append(self.method.criterion.seconds)
        self.history.step_seconds.append(time.perf_counter() - start + views_seconds)
        self.epoch, self.batch = divmod(len(self.history.losses), batches)
        if self.batch == 0:
            self._look_at_embeddings()
        self._is_whole = True
        if self.board is not None:
            self.board.note(self.history)

    def _update(self, batch):
        """Change the parameters; returns the loss before."""
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.device)
        self._watch.begin_step()
        for part in batch.parts(self.settings.accumulate):
            self._watch.begin_part()
            narrow = self.settings.precision == "bfloat16"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=narrow):
                loss = self._forward(part)
            share = len(part.labels) / len(batch.labels)
            (loss * share).backward()
            total = total + loss.detach() * share
        self.optimizer.step()
        self.schedule.step()
        self.method.after_step()
        return total

    def _look_at_embeddings(self):
        embeddings = self._watch.embeddings()
        health = measure_health(embeddings)
        before = zip(self.history.spreads[-1:], self.history.ranks[-1:], strict=True)
        least = for_so_many(self.method.least_health, len(embeddings))
        was_collapsed = any(Health(*values).complaint(least) for values in before)
        self.history.spreads.append(health.spread)
        self.history.ranks.append(health.rank)
        complaint = health.complaint(least)
        if complaint and not was_collapsed and self.ranks.rank == 0:
            log.warning("%s: collapse at epoch %d: %s", self.settings.method, self.epoch, complaint)

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
        if self.ranks.rank == 0:
            write_whole(self.checkpoint, content)
            batches = max(1, self.steps // self.settings.epochs)
            write_csv(self.checkpoint.with_suffix(".csv"), self.history, batches)
        self._written_here, self._begun = True, None

    def _encode(self):
        return encode(
            {
                "epoch": self.epoch,
                "batch": self.batch,
                "model": self.method.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "random": self._random,
                "images": self._shape,
                "settings": self.settings.as_dict(),
                "history": dataclasses.asdict(self.history),
            }
        )

    def load(self, batches):
        """Go on from the checkpoint, of a run with `batches` an epoch; nothing changes where it cannot be used.

        Raises:
            ValueError: It is none, cannot be read, or comes from a run with other settings or another model.
        """
        path = self.checkpoint
        state = read_checkpoint(path, "--resume")
        check_settings(path, state["settings"], self.settings.as_dict())
        history, epoch, batch = state["history"], state["epoch"], state["batch"]
        steps = epoch * batches + batch
        if not (batch < batches and steps == len(history.losses) and epoch <= self.settings.epochs):
            raise ValueError(
                f"--resume: {path} must come from a run of {batches} steps per epoch, got {len(history.losses)} steps"
                f" in {epoch} epochs"
            )
        before = copy.deepcopy(self.method.state_dict())
        try:
            self._check_optimizer(state["optimizer"])
            random = {kind: state["random"].get(kind, own) for kind, own in self._random.items()}
            for kind, generator_state in random.items():
                torch.Generator(kind).set_state(generator_state)
            self.method.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
        except Exception as error:  # whatever a foreign file leads to
            self.method.load_state_dict(before)
            raise ValueError(f"--resume: {path} must hold the model of this run, got another") from error
        self.history, self.epoch, self.batch, self._random = history, epoch, batch, random

    def _check_optimizer(self, state):
        (group,) = self.optimizer.param_groups
        (saved,) = state["param_groups"]
        for index, parameter in zip(saved["params"], group["params"], strict=True):
            for name, value in state["state"].get(index, {}).items():
                if name != "step" and value.shape != parameter.shape:
                    raise ValueError(name)


def train(trainings, views, title="pretrain"):
    """Take every training to its end, all on the same views, step by step in turn: what else happens on the machine
    falls on all alike. Each ends as it would alone.

    An interrupt from the keyboard is held back to the end of the step; checkpoints are written before it is raised.
    """
    epochs = trainings[0].settings.epochs
    ranks, device = trainings[0].ranks, trainings[0].device
    steps = epochs * len(views) * len(trainings)
    done = sum(len(training.history.losses) for training in trainings)
    progress = tqdm(
        total=steps, initial=done, desc=title, unit="step", disable=None if ranks.rank == 0 else True
    )
    for training in trainings:
        training.begin()
    try:
        with progress, _held_back_interrupt() as is_interrupted:
            for epoch in range(min(training.epoch for training in trainings), epochs):
                waiting = [training for training in trainings if training.epoch == epoch]
                first = min(training.batch for training in waiting)
                batches = views.epoch(epoch, first)
                for index in range(first, len(views)):
                    start = time.perf_counter()
                    batch = next(batches)
                    views_seconds = time.perf_counter() - start
                    ready = [training for training in waiting if training.batch == index]
                    # Each goes first as often as the others: the second finds the views in the cache.
                    for training in ready if (epoch + index) % 2 else ready[::-1]:
                        training.step(batch, len(views), views_seconds)
                        progress.set_postfix(loss=f"{training.history.losses[-1]:.4f}", refresh=False)
                        progress.update()
                    stop = ranks.any(is_interrupted(), device)
                    if stop and index + 1 < len(views):
                        raise KeyboardInterrupt
                for training in waiting:
                    training.save()
                if stop:
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
