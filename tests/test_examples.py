"""The examples in short form: what they show must hold after a few epochs."""

import importlib
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch.distributed import run as torchrun

FOLDER = pathlib.Path(__file__).parent.parent / "examples"
PROGRAMS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "digits")
PACKAGES = {"lightning_module": "lightning", "accelerate_loop": "accelerate"}


@pytest.fixture(autouse=True)
def alone(monkeypatch, set_threads):
    """One thread, and no module of an example left behind: their names are common ones."""
    set_threads(1)
    monkeypatch.syspath_prepend(FOLDER)
    yield
    for name in ("digits", *PROGRAMS):
        sys.modules.pop(name, None)


def example(name):
    if name in PACKAGES:
        reason = f"{PACKAGES[name]} is not installed (make test-peers installs it)"
        pytest.importorskip(PACKAGES[name], reason=reason)
    return importlib.import_module(name)


@pytest.mark.parametrize("name", ["simclr", "moco"])
def test_without_labels_the_loss_falls(name):
    losses = example(name).main(epochs=3)["losses"]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("name", ["clip", "mixup"])
def test_with_captions_or_labels_digits_are_recognised(name):
    shown = example(name).main(epochs=3)
    assert shown["losses"][-1] < shown["losses"][0]
    assert shown["before"] < 0.3 and shown["after"] > 0.5


def test_lightning():
    losses = example("lightning_module").main(
        epochs=3, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )["losses"]
    assert losses[-1] < losses[0] - 0.1


def test_accelerate():
    losses = example("accelerate_loop").main(epochs=3, cpu=True)["losses"]
    assert losses[-1] < losses[0] - 0.1


def test_one_process_of_torchrun(monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    losses = example("torchrun").main(epochs=3)["losses"]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.slow
def test_two_processes_of_torchrun():
    command = [sys.executable, "-m", torchrun.__name__, "--standalone", "--nproc-per-node", "2"]
    command += [str(FOLDER / "torchrun.py"), "--epochs", "3"]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    before, after = (float(number) for number in line.split(",")[0].removeprefix("loss ").split(" -> "))
    assert after < before - 0.1


def test_examples_are_short():
    for path in FOLDER.glob("*.py"):
        assert len(path.read_text().splitlines()) < 100, path.name
    assert len(PROGRAMS) == 7


def test_command_line(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["simclr.py", "--epochs", "2"])
    assert example("digits").epochs(default=20) == 2
    assert torch.isfinite(example("digits").load()[0][0]).all()
