"""The benchmark of the recipes: its plain losses are the recipes', and it keeps and shows what it has run."""

import pytest
import torch

from benchmarks import recipes, recipes_tables
from benchmarks.recipes_plain import PLAIN
from ssl_kernels.recipes import experiment


@pytest.mark.parametrize("method", PLAIN)
def test_plain_loss_is_that_of_the_recipe(method):
    """In two steps from the same weights; the first leaves a queue and a centre to the second."""
    images = recipes.load(method, 0)
    losses = {"ours": None, "plain": PLAIN[method]}
    settings = recipes.settings_of(method, 0)
    ours, plain = experiment.prepare_trainings(images, losses, settings).values()
    batch = next(images.views.epoch(0)).rows(slice(48))
    for _ in range(2):
        for training in (ours, plain):
            training.step(batch, 3)
        assert plain.history.losses[-1] == pytest.approx(ours.history.losses[-1], rel=1e-3, abs=1e-6)
        gradients = [
            torch.cat([each.grad.flatten() for each in training.method.parameters() if each.requires_grad])
            for training in (ours, plain)
        ]
        assert (gradients[0] - gradients[1]).norm() <= 1e-2 * gradients[1].norm()


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Nothing stored yet; a training is a line of numbers that tell it."""
    monkeypatch.setattr(recipes, "STORE", tmp_path / "recipes.csv")
    trained = []

    def line(run, method, seed):
        trained.append((run, method, seed))
        value = 0.8 if run == "plain" else 0.9 + seed / 100
        numbers = {"knn": value, "linear": value, "few": value, "rank": 3.0}
        # The last seed runs elsewhere, and faster.
        time = (
            {"seconds": 20.0 + seed, "machine": "here"} if seed < 2 else {"seconds": 1.0, "machine": "there"}
        )
        return [{"run": run, "name": method, **numbers, **time}]

    monkeypatch.setattr(recipes, "train", lambda method, seed: line("ours", method, seed))
    monkeypatch.setattr(recipes, "train_plain", lambda method, seed: line("plain", method, seed))
    return trained


def test_what_is_stored_is_not_run_again(store):
    recipes.run_missing(2, ["simsiam", "jigsaw"])
    assert store == [("ours", "simsiam", 0), ("ours", "jigsaw", 0)]
    recipes.run_missing(1, ["simsiam"])  # of those that are missing
    assert store[2:] == [("ours", "simsiam", 1)]
    recipes.run_missing(None, ["simsiam"])
    assert store[3:] == [
        ("ours", "simsiam", 2),
        *(("plain", "simsiam", seed) for seed in range(3)),
    ]
    recipes.run_missing(None, ["simsiam"])
    assert len(store) == 7


def test_tables_are_made_of_what_is_stored(store, tmp_path):
    recipes.run_missing(None, ["simsiam"])
    recipes.run_missing(1, ["swav"])
    page = tmp_path / "page.md"
    marks = [
        f"{recipes_tables.BEGIN.format(name)}stale\n{recipes_tables.END}" for name in recipes_tables.TABLES
    ]
    page.write_text("before\n" + "between\n".join(marks) + "after\n")
    for _ in range(2):  # what it wrote is put anew
        recipes_tables.write(page, recipes.read_lines())
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and text.count("between\n") == 3
        assert "stale" not in text
        ours = "91.0 ± 1.0 | 91.0 ± 1.0 | 91.0 ± 1.0 | 3.0 | 20"
        assert f"| `simsiam` | {ours} | 80.0 ± 0.0 | 80.0 ± 0.0 | 20 |" in text
        assert "| `swav` | 90.0 (1) | 90.0 (1) | 90.0 (1) | 3.0 | 20 | – | – | – |" in text
        assert "| `simclr` | – | – | – | – | – | – | – | – |" in text
        assert "processor: here." in text
