"""Checkpoints of trainings: read with care, since any file may be given."""

import dataclasses
import io
import warnings

import torch

PARTS = ("settings", "model", "optimizer", "schedule", "random", "images")  # dictionaries of a checkpoint


@dataclasses.dataclass
class History:
    """Of every step: its loss, learning rate, the seconds in forward and backward of the loss alone, and those of the
    whole step with the making of its views. Of every epoch: spread and rank of the embeddings, as in `collapse.Health`.
    """

    losses: list = dataclasses.field(default_factory=list)
    loss_seconds: list = dataclasses.field(default_factory=list)
    step_seconds: list = dataclasses.field(default_factory=list)
    rates: list = dataclasses.field(default_factory=list)
    spreads: list = dataclasses.field(default_factory=list)
    ranks: list = dataclasses.field(default_factory=list)

    @property
    def seconds(self):
        return sum(self.step_seconds)


OF_STEPS = ("losses", "loss_seconds", "step_seconds", "rates")
OF_EPOCHS = ("spreads", "ranks")


def encode(state):
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def read_checkpoint(path, option):
    """What a `Training` wrote, with a `History`.

    Args:
        option: Of the command line that named it, for messages.

    Raises:
        ValueError: It is no checkpoint, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            content = io.BytesIO(file.read())
    except OSError as error:
        raise ValueError(f"{option}: {path} must be a file that can be read ({error.strerror})") from error
    foreign = f"{option}: {path} must be a checkpoint of this command, got another file"
    try:
        with warnings.catch_warnings(action="ignore"):  # about files that are refused below
            state = dict(torch.load(content, map_location="cpu", weights_only=True))
        history, count = state["history"], len(state["history"]["losses"])
        is_ours = (
            all(isinstance(state[name], dict) for name in PARTS)
            and all(type(state[name]) is int and state[name] >= 0 for name in ("epoch", "batch"))
            and all(len(history[name]) == count for name in OF_STEPS)
            and all(len(history[name]) == state["epoch"] for name in OF_EPOCHS)
            and all(type(value) is float for values in history.values() for value in values)
            and all(isinstance(state["settings"][name], str) for name in ("method", "data"))
        )
        history = History(**history)
    except Exception as error:  # a file of any content, which may fail anywhere
        raise ValueError(foreign) from error
    if not is_ours:
        raise ValueError(foreign)
    return state | {"history": history}


def check_settings(path, saved, settings):
    """Raise ValueError where a run with the dictionary `settings` cannot go on from one that had `saved`."""
    for name, value in settings.items():
        if saved.get(name) != value:
            raise ValueError(f"--resume: {name} must be {saved.get(name)} as in {path}, got {value}")
