import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_kernels.recipes import report
from ssl_kernels.recipes.checkpoints import History
from ssl_kernels.recipes.contention import Contention
from ssl_kernels.recipes.engine import Settings
from ssl_kernels.recipes.evaluation import Accuracy
from ssl_kernels.recipes.experiment import Run
from ssl_kernels.recipes.logs import write_csv


def make_runs(classes=10, trained=("plain PyTorch", "ssl_kernels (native)")):
    """(runs, labels) with features that lie by class."""
    labels = torch.arange(40) % classes
    features = torch.eye(classes)[labels] + 0.1 * torch.rand(40, classes)
    runs = [Run("untrained encoder", Accuracy(0.5, 0.25, 0.125), features)]
    for rank, name in enumerate(trained):
        loss_seconds = [seconds / 2**rank for seconds in (0.2, 0.4, 1.6)]
        history = History([4.0, 2.0, 1.0], loss_seconds, [seconds + 0.4 for seconds in loss_seconds])
        runs.append(Run(name, Accuracy(0.9, 0.95, 0.8), features, history, peak_bytes=8_000_000 // 4**rank))
    return runs, labels


def test_table():
    runs, _ = make_runs()
    header, rule, untrained, plain, ours = report.format_table(runs).splitlines()
    assert len({len(header), len(rule), len(untrained), len(plain), len(ours)}) == 1
    assert untrained.split("  ")[0] == "untrained encoder"
    assert "50.0 %" in untrained and "25.0 %" in untrained and "12.5 %" in untrained
    assert re.split(r"  +", ours)[-3:] == ["200.0 (150.0 to 500.0)", "600.0 (550.0 to 900.0)", "2.0 MB"]
    assert "1.0000" in plain


def test_the_final_loss_is_that_of_the_last_twentieth():
    for count, expected in ((3, 2.0), (19, 18.0), (40, 38.5), (59, 57.5)):
        run = Run("ours", None, None, History([float(loss) for loss in range(count)]))
        assert run.final_loss == expected


def test_the_untrained_encoder_is_drawn_beside_ours(monkeypatch, tmp_path):
    """Not raw pixels, which come before it."""
    runs, labels = make_runs()
    drawn = []
    monkeypatch.setattr(report, "draw_embeddings", lambda runs, *_: drawn.extend(run.name for run in runs))
    monkeypatch.setattr(report, "draw_losses", lambda runs, *_: drawn.append([run.name for run in runs]))
    pixels = Run("raw pixels", Accuracy(0.5, 0.5, 0.5), runs[0].features)
    settings = Settings("simclr", "digits", epochs=1, batch_size=8, learning_rate=0.1)
    contention = Contention(waiting=0.0, load=1.0, own_load=1.0, cores=2)
    report.write_report([pixels, *runs], labels, settings, "", contention, tmp_path)
    ours = "ssl_kernels (native)"
    assert drawn == [["plain PyTorch", ours], "untrained encoder", ours]


def test_the_log_in_full(tmp_path):
    """Spread and rank in the last line of an epoch that was looked at."""
    history = History([1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [0.1, 0.2, 0.3], [0.5], [1.5])
    write_csv(tmp_path / "run.csv", history, 2)
    assert (tmp_path / "run.csv").read_text().splitlines() == [
        "step,epoch,loss,learning_rate,loss_seconds,step_seconds,spread,rank",
        "1,1,1.0,0.1,4.0,7.0,,",
        "2,1,2.0,0.2,5.0,8.0,0.5,1.5",
        "3,2,3.0,0.3,6.0,9.0,,",
    ]


def test_gain():
    runs, _ = make_runs()
    assert report.format_gain(*runs[1:]) == (
        "ssl_kernels (native) against plain PyTorch: loss 2.0 (2.0 to 2.0) times as fast in 1/4.0 of the memory,"
        " training 1.33 (1.27 to 1.50) times as fast (median of the steps and quartiles)"
    )


def test_gain_compares_steps_that_ran_one_after_the_other():
    """Other work that slows all steps from the third on is in no ratio; totals and medians of each would show it."""
    plain, ours = (Run(name, None, None, peak_bytes=1) for name in ("plain", "ours"))
    slowed = [1, 1, 30, 30, 30]
    plain.history = History([1.0] * 5, [4.0 * s for s in slowed], [8.0 * s for s in slowed])
    ours.history = History([1.0] * 5, [1.0 * s for s in slowed], [4.0 * s for s in [1, 1, 30, 30, 600]])
    assert "loss 4.0 (4.0 to 4.0) times" in report.format_gain(plain, ours)
    assert "training 2.00 (2.00 to 2.00) times" in report.format_gain(plain, ours)


@pytest.mark.parametrize(
    "classes, trained, memory",
    [
        (10, ("plain PyTorch", "ssl_kernels (native)"), "8.0 MB"),
        (12, ("ssl_kernels (chunked)",), "8.0 MB"),
        (10, ("ssl_kernels (native)",), "  -"),
    ],
    ids=["compared", "alone, many classes", "over several processes"],
)
def test_report_writes_figures_and_numbers(classes, trained, memory, tmp_path):
    runs, labels = make_runs(classes, trained)
    if "-" in memory:
        runs[-1].peak_bytes = None
    settings = Settings("simclr", "digits", epochs=1, batch_size=8, learning_rate=0.1)
    contention = Contention(waiting=0.4, load=7.25, own_load=1.5, cores=2)
    text = report.write_report(runs, labels, settings, "some machine", contention, tmp_path)
    assert "the machine was busy (threads of this process waited for a core 40 % of their time, load" in text
    assert ("against" in text) == (len(trained) == 2)
    assert f"{memory}\n" in text
    for name in ("loss.png", "embedding.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert pixels.shape[1] > 600
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # something is drawn
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"] == "some machine"
    assert results["contention"]["waiting"] == 0.4
    assert results["settings"]["batch_size"] == 8
    assert results["runs"][-1]["losses"] == [4.0, 2.0, 1.0]
    history = runs[-1].history
    assert results["runs"][-1]["seconds"] == history.seconds == sum(history.step_seconds)
    assert results["runs"][-1]["loss_seconds_total"] == sum(history.loss_seconds)
    assert results["runs"][-1]["accuracy"] == {"knn": 0.9, "linear": 0.95, "few": 0.8}
