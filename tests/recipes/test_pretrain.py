"""The command `pretrain`, from its options to the files that it leaves.

One file, although a long one: every test runs the command, in the same way.
"""

import argparse
import errno
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import ssl_kernels
from ssl_kernels.cli import main
from ssl_kernels.recipes import data, engine, experiment, ranks, report
from ssl_kernels.recipes import pretrain as command
from ssl_kernels.recipes.baseline import plain_moco_loss, plain_nt_xent_loss
from ssl_kernels.recipes.evaluation import Accuracy
from tests.recipes.image_sets import write_cifar10, write_folder

FILES = {"loss.png", "embedding.png", "results.json"}


def pretrain(*options):
    return main(["pretrain", *map(str, options)])


def trained_runs(out):
    results = json.loads((out / "results.json").read_text())
    return [run for run in results["runs"] if "losses" in run]


def test_digits_end_to_end(tmp_path, capsys):
    options = ["--epochs", 3, "--batch-size", 256, "--out", tmp_path]
    assert pretrain(*options) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *FILES,
        "plain.pt",
        "plain.csv",
        "ssl_kernels.pt",
        "ssl_kernels.csv",
    }
    printed = capsys.readouterr().out
    for row in ("raw pixels", "untrained encoder", "plain PyTorch", "ssl_kernels ("):
        assert re.search(rf"^{re.escape(row)}", printed, re.MULTILINE)
    plain, ours = trained_runs(tmp_path)
    assert len(ours["losses"]) == 15
    assert ours["losses"][-1] < ours["losses"][0] - 0.2
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-2)
    assert ours["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-6)
    assert ours["accuracy"]["knn"] > 0.9
    assert ours["loss_peak_bytes"] > 0

    # All epochs are in the checkpoints: nothing is trained again.
    assert pretrain(*options, "--resume") == 0
    assert trained_runs(tmp_path) == [plain, ours]
    with pytest.raises(SystemExit):
        pretrain(*options, "--resume", "--temperature", "0.2")
    assert "--resume: temperature must be 0.5 as in" in capsys.readouterr().err


def test_moco_end_to_end(tmp_path, capsys):
    options = ["--method", "moco", "--epochs", 1, "--batch-size", 256, "--queue-size", 600, "--no-compare"]
    assert pretrain(*options, "--out", tmp_path) == 0
    (ours,) = trained_runs(tmp_path)
    assert len(ours["losses"]) == 5
    assert ours["accuracy"]["knn"] > 0.8
    assert ours["loss_peak_bytes"] > 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["settings"]["queue_size"], results["settings"]["momentum"]) == (600, 0.99)


def test_folder(tmp_path, capsys):
    write_folder(tmp_path / "images")
    out = tmp_path / "out"
    options = ["--data", "folder", "--root", tmp_path / "images", "--image-size", 32, "--batch-size", 6]
    assert pretrain(*options, "--epochs", 1, "--workers", 0, "--backend", "chunked", "--out", out) == 0
    assert {path.name for path in out.iterdir()} == {*FILES, "ssl_kernels.pt", "ssl_kernels.csv"}
    (ours,) = trained_runs(out)
    assert ours["name"] == "ssl_kernels (chunked)"
    assert len(ours["losses"]) == 3


def test_a_broken_image_ends_a_run_in_a_line(tmp_path, capsys):
    """Which a process that loads images met."""
    write_folder(tmp_path / "images")
    for broken in (tmp_path / "images").glob("*/3.png"):
        broken.write_bytes(broken.read_bytes()[:1000])
    options = ["--data", "folder", "--root", tmp_path / "images", "--image-size", 32, "--batch-size", 6]
    message = refused(capsys, *options, "--workers", 1, "--out", tmp_path / "out")
    assert f"error: --root must hold images that can be read, got {tmp_path / 'images'}/" in message


def test_cifar10(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    out = tmp_path / "out"
    options = ["--data", "cifar10", "--root", tmp_path, "--short", "--batch-size", 20, "--workers", 0]
    assert pretrain(*options, "--compare", "--out", out) == 0
    plain, ours = trained_runs(out)
    assert len(ours["losses"]) == 2
    assert ours["losses"][0] == pytest.approx(plain["losses"][0], rel=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--epochs", "0"], "argument --epochs: must be a whole number from 1, got 0"),
        (["--epochs", "many"], "argument --epochs: must be a whole number from 1, got many"),
        (["--batch-size", "1"], "argument --batch-size: must be a whole number from 2, got 1"),
        (["--batch-size", "5000"], "--batch-size must be at most the 1347 training images, got 5000"),
        (["--temperature", "0"], "argument --temperature: must be a finite number over 0, got 0"),
        (["--temperature", "nan"], "argument --temperature: must be a finite number over 0, got nan"),
        (["--seed", "-1"], "argument --seed: must be a whole number from 0 to 2**32 - 1, got -1"),
        (["--method", "alchemy"], "argument --method: invalid choice: 'alchemy'"),
        (["--queue-size", "100"], "--queue-size must come with a --method that has it, got simclr"),
        (
            ["--method", "byol", "--temperature", "1"],
            "--temperature must come with a --method that has it, got byol",
        ),
        (
            ["--method", "byol", "--compare"],
            "--compare must come with --method simclr or moco in one process",
        ),
        (
            ["--method", "rotation", "--backend", "native"],
            "--backend must come with a --method whose loss is of ssl",
        ),
        (["--option", "depth=3"], "--option must name one of simclr's (temperature, width), got depth"),
        (["--option", "width=wide"], "--option width must be of type int, got wide"),
        (["--option", "width"], "argument --option: must be NAME=VALUE, got width"),
        (
            ["--option", "temperature=0"],
            "--method simclr must run with its options, got temperature = 0.0, width = 128 (nt_xent_loss: temperature",
        ),
        (["--option", "width=0"], "--option width must be a whole number from 1, got 0"),
        (["--option", "temperature=nan"], "--option temperature must be a finite number, got nan"),
        (
            ["--method", "supervised", "--option", "label_smoothing=2"],
            "got label_smoothing = 2.0 (label_smoothing",
        ),
        (
            ["--method", "mae", "--option", "hidden_part=2"],
            "hidden_part must be a number between 0 and 1, got 2.0",
        ),
        (
            ["--method", "clip", "--option", "logit_scale=0"],
            "logit_scale must be a number over 0, at most 100, got 0.0",
        ),
        (["--method", "clip", "--option", "logit_scale=100.5"], "at most 100, got 100.5"),
        (
            ["--accumulate", "900"],
            "--accumulate must leave at least 2 images in each part of --batch-size, got 900",
        ),
        (["--warmup", "2"], "argument --warmup: must be a number from 0 to 1, got 2"),
        (
            ["--method", "moco", "--momentum", "1.5"],
            "argument --momentum: must be a number from 0 to 1, got 1.5",
        ),
        (["--workers", "-1"], "argument --workers: must be a whole number from 0, got -1"),
        (["--data", "mnist"], "argument --data: invalid choice: 'mnist'"),
        (["--data", "cifar10"], "--root must name the folder of the images for --data cifar10, got none"),
        (["--device", "toaster"], "--device must be one that torch can use, got toaster"),
        (
            ["--backend", "fast"],
            'backend must be "native", "triton", "chunked", "reference" or None, got \'fast\'',
        ),
        (["--device", "meta"], "--device must be one that torch can use, got meta"),
        (["--root", "."], "--root must come with --data cifar10 or folder, got digits"),
        (["--image-size", "4"], "argument --image-size: must be a whole number from 8, got 4"),
        (["--image-size", "8"], "--image-size must come with --data folder, got digits"),
        (
            ["--method", "moco", "--queue-size", str(10**15)],
            f"--queue-size must fit into memory, got {10**15}",
        ),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain(*options, "--out", tmp_path)
    assert stop.value.code == 2
    assert message in one_line(capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["imix", "mixco"])
def test_a_wrong_alpha_is_refused_after_a_compilation_too(method, tmp_path, capsys, monkeypatch):
    """torch.compile, applied to anything, turns off the checks of torch.distributions in all of the process."""
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", False)
    with pytest.raises(SystemExit) as stop:
        pretrain("--method", method, "--option", "alpha=-1", "--out", tmp_path)
    assert stop.value.code == 2
    assert f"--method {method} must run with its options, got temperature" in one_line(capsys)


def parsed(*options):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(option) for option in options])


EVERY_OPTION = (
    "--method moco --data folder --root images --image-size 24 --workers 3 --epochs 7 --batch-size 20"
    " --learning-rate 0.25 --optimizer lars --weight-decay 0.5 --warmup 0.75 --temperature 0.125 --queue-size 40"
    " --momentum 0.5 --option width=24 --seed 9 --precision bfloat16 --accumulate 3 --compile"
).split()


def test_every_option_reaches_the_settings():
    assert command.choose_settings(parsed(*EVERY_OPTION)) == engine.Settings(
        "moco",
        "folder",
        epochs=7,
        batch_size=20,
        learning_rate=0.25,
        optimizer="lars",
        weight_decay=0.5,
        warmup=0.75,
        precision="bfloat16",
        accumulate=3,
        compile=True,
        seed=9,
        image_size=24,
        options={"temperature": 0.125, "queue_size": 40, "momentum": 0.5, "width": 24},
    )


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], {"epochs": 150, "batch_size": 1024, "learning_rate": 6e-3, "options": {"temperature": 0.5, "width": 128}}),
        (["--short"], {"epochs": 15, "batch_size": 256, "learning_rate": 3e-3}),
        (["--method", "byol"], {"epochs": 100, "batch_size": 256, "learning_rate": 3e-3}),
        (["--method", "byol", "--short"], {"epochs": 15, "batch_size": 256}),
        (["--data", "cifar10", "--root", "."], {"epochs": 200, "batch_size": 512, "learning_rate": 1e-3}),
        (
            ["--data", "folder", "--root", ".", "--method", "moco"],
            {"options": {"temperature": 0.2, "queue_size": 65536, "momentum": 0.999, "width": 128}},
        ),
        (["--option", "width=24"], {"options": {"temperature": 0.5, "width": 24}}),
        (
            ["--method", "barlow", "--option", "off-diagonal-weight=0.5"],
            {"options": {"off_diagonal_weight": 0.5, "width": 256}},
        ),
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_a_method_takes_unless_told_otherwise(options, expected):
    settings = command.choose_settings(parsed(*options))
    assert {name: getattr(settings, name) for name in expected} == expected


@pytest.mark.parametrize("method, views, crops", [("moco", 2, 0), ("swav", 2, 2), ("rotation", 1, 0)])
def test_images_are_loaded_as_the_options_say(method, views, crops, monkeypatch):
    class Asked(Exception):
        pass

    def load_data(*args, **options):
        raise Asked(args, options)

    monkeypatch.setattr(data, "load_data", load_data)
    options = [option for option in EVERY_OPTION if option != "moco"]
    options[1:1] = [method]
    without = ("--temperature", "--queue-size", "--momentum", "--option")
    options = [
        each
        for name, value in zip(options[:-1:2], options[1:-1:2], strict=True)
        for each in (name, value)
        if name not in without
    ]
    with pytest.raises(Asked) as asked:
        command.set_up(parsed(*options, "--device", "cpu"))
    assert asked.value.args == (
        ("folder", 20, 9),
        {"root": "images", "image_size": 24, "workers": 3, "views": views, "crops": crops},
    )


@pytest.mark.parametrize(
    "options, names",
    [
        ([], ["plain PyTorch", "ssl_kernels (native)"]),
        (["--method", "moco", "--backend", "chunked"], ["plain PyTorch", "ssl_kernels (chunked)"]),
        (["--no-compare"], ["ssl_kernels (native)"]),
        (["--data", "mnist5k"], ["ssl_kernels (native)"]),
        (["--data", "mnist5k", "--compare"], ["plain PyTorch", "ssl_kernels (native)"]),
        (["--method", "byol"], ["ssl_kernels (native)"]),
        (["--method", "rotation"], ["ssl_kernels"]),
    ],
    ids=str,
)
def test_which_losses_are_run(options, names):
    """With the backend that was asked for."""
    args = parsed(*options)
    losses = command.choose_losses(args, command.choose_settings(args), ranks.ALONE, torch.device("cpu"))
    assert list(losses) == names
    *plain, ours = losses.values()
    assert plain in ([], [{"simclr": plain_nt_xent_loss, "moco": plain_moco_loss}.get(args.method)])
    assert getattr(ours, "keywords", {}) == ({} if args.backend is None else {"backend": args.backend})


def one_line(capsys):
    """What was printed as an error, which must be a line without a traceback."""
    error = capsys.readouterr().err
    lines = error.splitlines()
    assert len(lines) == 1 and lines[0].startswith("python -m ssl_kernels"), error
    return error


@pytest.fixture
def no_work(monkeypatch):
    """Fails where anything is judged or trained."""

    def fail(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr(experiment, "run_experiment", fail)


def refused(capsys, *options):
    """The line that refuses them."""
    with pytest.raises(SystemExit) as stop:
        pretrain(*options)
    assert stop.value.code == 2
    return one_line(capsys)


def test_out_that_cannot_be_written(tmp_path, capsys, no_work):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below", "/proc", "/proc/nonesuch"):
        assert f"--out must be a folder that can be written to, got {out} (" in refused(capsys, "--out", out)
    for name in ("plain.pt", "plain.csv", "results.json"):
        (tmp_path / name).mkdir()
        assert f"--out must be a folder without a folder {name} in it" in refused(capsys, "--out", tmp_path)
        (tmp_path / name).rmdir()


def test_out_without_room_for_the_checkpoints(tmp_path, capsys, no_work, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
    message = refused(capsys, "--out", tmp_path)
    assert re.search(r"--out must have room for 1\.\d MB of checkpoints, got .* with 1\.0 MB", message)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3_000_000))
    with pytest.raises(AssertionError, match="the work began"):
        pretrain("--out", tmp_path)


@pytest.fixture
def no_judging(monkeypatch):
    """Leaves out what takes longest and is judged elsewhere."""
    judge_nothing(monkeypatch)


def judge_nothing(monkeypatch):
    monkeypatch.setattr(experiment, "evaluate_features", lambda *_: Accuracy(0.5, 0.5, 0.5))
    monkeypatch.setattr(report, "draw_embeddings", lambda *_: None)
    monkeypatch.setattr(report, "draw_losses", lambda *_: None)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The options of a run of two epochs of two steps, the folder that it wrote, and the bytes of its checkpoint."""
    out = tmp_path_factory.mktemp("short")
    options = ["--epochs", 2, "--batch-size", 512, "--no-compare", "--backend", "chunked"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        judge_nothing(monkeypatch)
        assert pretrain(*options, "--out", out) == 0
    return options, out, (out / "ssl_kernels.pt").read_bytes()


def other_state(content, change):
    state = torch.load(io.BytesIO(content), weights_only=True)
    changed = io.BytesIO()
    torch.save(change(state), changed)
    return changed.getvalue()


def narrower_model(state):
    return state | {
        "model": {name: value[:1] if value.dim() else value for name, value in state["model"].items()}
    }


def narrower_moments(state):
    moments = {
        index: {"step": at["step"], "exp_avg": at["exp_avg"][:1]}
        for index, at in state["optimizer"]["state"].items()
    }
    return state | {"optimizer": state["optimizer"] | {"state": moments}}


FOREIGN = {
    "empty": lambda whole: b"",
    "garbage": lambda whole: bytes(range(256)) * 40,
    "text": lambda whole: b'{"epoch": 1}',
    "truncated": lambda whole: whole[: len(whole) // 2],
    "a flipped byte in the middle": lambda whole: whole[:900] + bytes([whole[900] ^ 255]) + whole[901:],
    "an archive": lambda whole: b"PK\x05\x06" + bytes(18),
    "a pickle": lambda whole: pickle.dumps(SimpleNamespace(epoch=1)),
    "a tensor": lambda whole: other_state(whole, lambda state: torch.zeros(3)),
    "a list": lambda whole: other_state(whole, lambda state: [1, 2]),
    "weights": lambda whole: other_state(whole, lambda state: state["model"]),
    "no schedule": lambda whole: other_state(whole, lambda state: state | {"schedule": None}),
    "no history": lambda whole: other_state(whole, lambda state: state | {"history": {}}),
    "history of no numbers": lambda whole: other_state(
        whole, lambda state: state | {"history": {name: ["a"] for name in state["history"]}}
    ),
    "more steps": lambda whole: other_state(whole, lambda state: state | {"batch": 1}),
    "negative": lambda whole: other_state(whole, lambda state: state | {"epoch": -2}),
    "another model": lambda whole: other_state(whole, narrower_model),
    "another optimizer": lambda whole: other_state(whole, narrower_moments),
    "no generator": lambda whole: other_state(
        whole, lambda state: state | {"random": {"cpu": torch.zeros(3, dtype=torch.uint8)}}
    ),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_checkpoint_that_is_none_is_refused(kind, short_run, tmp_path, capsys, no_work):
    options, _, whole = short_run
    path = tmp_path / "ssl_kernels.pt"
    content = FOREIGN[kind](whole)
    path.write_bytes(content)
    assert f"error: --resume: {path} must " in refused(capsys, *options, "--out", tmp_path, "--resume")
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_is_a_folder(short_run, tmp_path, capsys, no_work):
    (tmp_path / "ssl_kernels.pt").mkdir()
    message = refused(capsys, *short_run[0], "--out", tmp_path, "--resume")
    assert f"--resume: {tmp_path / 'ssl_kernels.pt'} must be a file that can be read (Is a dir" in message


def test_resume_says_that_there_is_nothing_to_go_on_from(tmp_path, capsys, no_work):
    with pytest.raises(AssertionError, match="the work began"):
        pretrain("--out", tmp_path, "--resume")
    assert f"nothing to go on from in {tmp_path}: the training begins\n" in capsys.readouterr().out


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(
    short_run, tmp_path, capsys, monkeypatch, no_judging
):
    options, out, _ = short_run
    calls = 0

    def full(descriptor):
        nonlocal calls
        calls += 1
        if calls == 3:  # checkpoint and log of the first epoch are whole
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = refused(capsys, *options, "--out", tmp_path)
    assert f"No space left on device: '{tmp_path / 'ssl_kernels.pt'}'" in message
    assert {path.name for path in tmp_path.iterdir()} == {"ssl_kernels.pt", "ssl_kernels.csv"}
    assert pretrain(*options, "--out", tmp_path, "--resume") == 0
    assert trained_runs(tmp_path)[0]["losses"] == trained_runs(out)[0]["losses"]


def test_interrupted_run_goes_on_bit_for_bit(short_run, tmp_path, capsys, monkeypatch, no_judging):
    """Ctrl-C in the first step of the second epoch, and once more in its last."""
    options, out, whole = short_run

    def interrupted_at(call):
        calls = 0

        def interrupted(training, batch):
            nonlocal calls
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGINT)
            return update(training, batch)

        monkeypatch.setattr(engine.Training, "_update", interrupted)
        with pytest.raises(SystemExit) as stop:
            pretrain(*options, "--out", tmp_path, "--resume")
        assert stop.value.code == 130
        assert "interrupted; --resume goes on from what is in" in one_line(capsys)
        monkeypatch.setattr(engine.Training, "_update", update)
        return torch.load(tmp_path / "ssl_kernels.pt", weights_only=True)

    update = engine.Training._update
    state = interrupted_at(3)
    assert (state["epoch"], state["batch"], len(state["history"]["losses"])) == (1, 1, 3)
    state = interrupted_at(1)
    assert (state["epoch"], state["batch"]) == (2, 0)
    assert pretrain(*options, "--out", tmp_path, "--resume") == 0
    assert trained_runs(tmp_path)[0]["losses"] == trained_runs(out)[0]["losses"]
    resumed = torch.load(tmp_path / "ssl_kernels.pt", weights_only=True)
    unbroken = torch.load(io.BytesIO(whole), weights_only=True)
    for part in ("model", "optimizer", "random", "epoch", "batch"):
        torch.testing.assert_close(resumed[part], unbroken[part], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["swav", "mixco"])
def test_torchrun_trains_judges_and_resumes(method, tmp_path):
    """A loss over a group, and one whose method gathers keys; rank 0 alone judges what was trained."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "ssl_kernels"]
    command = [*torchrun, "pretrain", "--method", method, "--batch-size", "512", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for options in (["--epochs", "1"], ["--epochs", "1", "--resume"]):
        ran = subprocess.run(
            [*command, *options], capture_output=True, text=True, env=environment, timeout=300
        )
        assert ran.returncode == 0, ran.stderr
        assert "FutureWarning" not in ran.stderr
        (ours,) = trained_runs(tmp_path)
        assert len(ours["losses"]) == 2 and ours["loss_peak_bytes"] is None


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys, no_judging):
    message = refused(capsys, "--learning-rate", 1e30, "--epochs", 3, "--no-compare", "--out", tmp_path)
    assert re.search(r"the loss is (nan|inf) at step \d: a lower --learning-rate may help", message)


def test_a_package_that_does_not_load_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ssl_kernels.recipes.report", None)
    monkeypatch.delattr(ssl_kernels.recipes, "report")
    assert "scikit-learn, matplotlib, tqdm, torchvision must load for it: " in refused(
        capsys, "--out", tmp_path
    )


def test_missing_packages_are_named(monkeypatch, capsys, tmp_path):
    find_spec = importlib.util.find_spec
    absent = ("sklearn", "tqdm")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in absent else find_spec(name, *rest)
    )
    with pytest.raises(SystemExit):
        pretrain("--out", tmp_path)
    message = "scikit-learn, tqdm must be installed for it: pip install scikit-learn tqdm\n"
    assert message in capsys.readouterr().err


def test_commands_are_listed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    assert re.search(r"^  pretrain +\S+", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit) as stop:
        main(["pretend"])
    assert stop.value.code == 2
    assert "invalid choice: 'pretend'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"ssl_kernels {ssl_kernels.__version__}\n"


def test_help_needs_none_of_the_demo_packages():
    script = """
import sys
for name in ("sklearn", "matplotlib", "tqdm", "torchvision"):
    sys.modules[name] = None  # importing it raises
from ssl_kernels.cli import main
main(["pretrain", "--help"])
"""
    ran = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    for option in ("--data", "--root", "--epochs", "--batch-size", "--temperature", "--seed", "--backend"):
        assert option in ran.stdout


class Writer:
    """In the place of torch.utils.tensorboard's."""

    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.scalars, self.is_closed = folder, purge_step, [], False

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def close(self):
        self.is_closed = True


def test_tensorboard_is_told_every_step(short_run, tmp_path, monkeypatch, no_judging):
    options, out, _ = short_run
    made = []

    def summary_writer(*args, **arguments):
        made.append(Writer(*args, **arguments))
        return made[-1]

    stand_in = SimpleNamespace(SummaryWriter=summary_writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    assert pretrain(*options, "--out", tmp_path, "--tensorboard") == 0
    (writer,) = made
    assert (writer.folder, writer.purge_step) == (tmp_path / "tensorboard" / "ssl_kernels", 1)
    losses = trained_runs(out)[0]["losses"]
    assert [each for each in writer.scalars if each[0] == "loss"] == [
        ("loss", loss, step) for step, loss in enumerate(losses, 1)
    ]
    ours = trained_runs(tmp_path)[0]
    for name, values in (
        ("learning rate", ours["rates"]),
        ("spread of the embeddings", [None, *ours["spreads"][:1] * 2, ours["spreads"][1]]),
        ("rank of the embeddings", [None, *ours["ranks"][:1] * 2, ours["ranks"][1]]),
    ):
        assert [each for each in writer.scalars if each[0] == name] == [
            (name, value, step) for step, value in enumerate(values, 1) if value is not None
        ]
    assert {name for name, *_ in writer.scalars} == {
        "loss",
        "learning rate",
        "spread of the embeddings",
        "rank of the embeddings",
    }
    assert writer.is_closed
    assert pretrain(*options, "--epochs", 2, "--out", tmp_path, "--tensorboard", "--resume") == 0
    assert made[-1].purge_step == len(losses) + 1  # what a resumed run writes anew


@pytest.mark.parametrize("when", ["add_scalar", "close"])
def test_tensorboard_on_a_full_disk(when, short_run, tmp_path, capsys, monkeypatch, no_judging):
    """Its thread meets it, and says nothing itself; the writer raises it from then on, when it is closed too."""

    class Thread(threading.Thread):
        __module__ = "tensorboard.summary.writer.event_file_writer"

        def run(self):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_):
        if not thread.ident:
            thread.start()
            thread.join()
        thread.run()

    (options, *_), thread = short_run, Thread()
    monkeypatch.setattr(Writer, "close", fail)
    monkeypatch.setattr(Writer, when, fail)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    hook = threading.excepthook
    message = refused(capsys, *options, "--out", tmp_path, "--tensorboard")
    assert (
        f"error: [Errno 28] No space left on device: '{tmp_path / 'tensorboard' / 'ssl_kernels'}'" in message
    )
    assert threading.excepthook == hook
    assert (tmp_path / "ssl_kernels.pt").exists() == (when == "close")


def test_tensorboard_that_is_not_installed(tmp_path, capsys, monkeypatch, no_work):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = refused(capsys, "--tensorboard", "--out", tmp_path)
    assert "--tensorboard must have tensorboard installed: pip install tensorboard" in message
