import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

import ssl_kernels
from ssl_kernels.cli import main
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
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "plain.pt", "ssl_kernels.pt"}
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
    assert {path.name for path in out.iterdir()} == {*FILES, "ssl_kernels.pt"}
    (ours,) = trained_runs(out)
    assert ours["name"] == "ssl_kernels (chunked)"
    assert len(ours["losses"]) == 3


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
        (["--method", "byol"], "argument --method: invalid choice: 'byol'"),
        (["--queue-size", "100"], "--queue-size and --momentum must come with --method moco"),
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
            "backend must be one of native, triton, chunked, reference or None, got 'fast'",
        ),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        pretrain(*options, "--out", tmp_path)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_out_that_is_a_file(tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        pretrain("--out", tmp_path / "file")
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch, capsys, tmp_path):
    find_spec = importlib.util.find_spec
    absent = ("sklearn", "tqdm")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in absent else find_spec(name, *rest)
    )
    with pytest.raises(SystemExit):
        pretrain("--out", tmp_path)
    message = "scikit-learn, tqdm must be installed for it: pip install ssl_kernels[demo]"
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
