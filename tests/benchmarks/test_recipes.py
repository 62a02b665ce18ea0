"""The benchmark of the recipes: its plain losses are the recipes', and it keeps and shows what it has run."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import recipes, recipes_tables
from benchmarks.recipes_plain import PLAIN
from ssl_kernels.recipes import evaluation, experiment


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


def test_every_table_takes_its_own_lines():
    """Each number of a table is one of its run, name and column, in percent."""
    columns = (*recipes.FEATURES, *recipes.PARTS, *recipes.CLASSIFIER)
    names = {
        "untrained": ["convolutional network"],
        "ours": ["simclr", "byol", *recipes.MIXED],
        "on digits": ["from mnist5k"],
        "on mnist5k": ["untrained", "from mnist5k", "from digits"],
    }
    keys = [(run, name, column) for run in names for name in names[run] for column in columns]
    value = {key: index / 1000 for index, key in enumerate(keys)}
    lines = [
        {"run": run, "name": name} | {column: str(value[run, name, column]) for column in columns}
        for run in names
        for name in names[run]
    ]

    def rows(table):
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]

    def row(title, run, name, columns):
        return [title, *(f"{100 * value[run, name, column]:.1f} (1)" for column in columns)]

    head, _, *found = rows(recipes_tables.fine_tuning(lines))
    assert head == ["", *(f"fine-tuned, {part} % of labels" for part in (1, 3, 10))]
    assert found == [
        row("from scratch", "untrained", "convolutional network", recipes.PARTS),
        *(row(f"from `{name}`", "ours", name, recipes.PARTS) for name in ("simclr", "byol")),
    ]
    head, _, *found = rows(recipes_tables.mixing(lines))
    assert head == ["", "accuracy", "calibration error", "accuracy under noise"]
    assert found == [row(f"`{name}`", "ours", name, recipes.CLASSIFIER) for name in recipes.MIXED]
    head, _, *found = rows(recipes_tables.transfer(lines))
    assert len(head) == 7 and found == [
        row(title, *key, (*recipes.FEATURES, *recipes.PARTS))
        for title, key in {
            "digits, untrained (fine-tuned: from scratch)": ("untrained", "convolutional network"),
            "digits, trained on digits": ("ours", "simclr"),
            "digits, trained on mnist5k": ("on digits", "from mnist5k"),
            "mnist5k, untrained (fine-tuned: from scratch)": ("on mnist5k", "untrained"),
            "mnist5k, trained on mnist5k": ("on mnist5k", "from mnist5k"),
            "mnist5k, trained on digits": ("on mnist5k", "from digits"),
        }.items()
    ]


def test_encoders_are_judged_on_the_other_images(monkeypatch):
    """By their features and fine-tuned on each part; from scratch where they were not trained."""

    def trained(method, seed, name, loss):
        encoder = f"{method} of {name}, {seed}"
        return SimpleNamespace(method=SimpleNamespace(encoder=encoder)), name, 1.0

    def finetune(encoder, images, part, seed, *, from_scratch):
        return encoder, images, part, seed, from_scratch

    monkeypatch.setattr(recipes, "trained", trained)
    monkeypatch.setattr(recipes, "finetune", finetune)
    monkeypatch.setattr(recipes, "judge", lambda encoder, images: {"knn": (encoder, images)})
    monkeypatch.setattr(experiment, "build_encoder", lambda *args: ("untrained", *args))
    encoders = {
        "untrained": ("untrained", "digits", 4, "simclr"),
        "from digits": "simclr of digits, 4",
        "from mnist5k": "simclr of mnist5k, 4",
    }
    judged = [("mnist5k", name) for name in encoders] + [("digits", "from mnist5k")]
    assert recipes.transfer(4) == [
        {"run": f"on {images}", "name": name, "knn": (encoders[name], images)}
        | {
            column: (encoders[name], images, part, 4, name == "untrained")
            for column, part in {"finetuned_1": 0.01, "finetuned_3": 0.03, "finetuned_10": 0.1}.items()
        }
        for images, name in judged
    ]


def test_classifiers_are_judged_under_noise():
    random = torch.Generator().manual_seed(0)
    rows, labels = torch.rand(400, 10, generator=random), torch.randint(10, (400,), generator=random)
    rows[torch.arange(400), labels] += 0.5
    images = SimpleNamespace(test=[(rows[:300], labels[:300]), (rows[300:], labels[300:])])
    found = recipes.judge_classifier(torch.nn.Identity(), images)
    noise = torch.Generator().manual_seed(0)
    noisy = torch.cat([x + 0.3 * torch.randn(x.shape, generator=noise) for x, _ in images.test])
    assert found == {
        "accuracy": evaluation.accuracy_of(rows, labels),
        "calibration": evaluation.calibration_error(rows, labels),
        "noisy": evaluation.accuracy_of(noisy, labels),
    }
    assert found["noisy"] < found["accuracy"] < 1
