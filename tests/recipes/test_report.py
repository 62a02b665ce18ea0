import json

import numpy as np
import pytest
import torch
from PIL import Image

from ssl_kernels.recipes import report
from ssl_kernels.recipes.evaluation import Accuracy
from ssl_kernels.recipes.experiment import Run
from ssl_kernels.recipes.simclr import History, Settings


def make_runs(classes=10, trained=("plain PyTorch", "ssl_kernels (native)")):
    """(runs, labels) with features that lie by class."""
    labels = torch.arange(40) % classes
    features = torch.eye(classes)[labels] + 0.1 * torch.rand(40, classes)
    runs = [Run("untrained encoder", Accuracy(0.5, 0.25, 0.125), features)]
    for rank, name in enumerate(trained):
        history = History(losses=[4.0, 2.0, 1.0], loss_seconds=[0.4 / 2**rank] * 3, seconds=6.0 - 2 * rank)
        runs.append(Run(name, Accuracy(0.9, 0.95, 0.8), features, history, peak_bytes=8_000_000 // 4**rank))
    return runs, labels


def test_table():
    runs, _ = make_runs()
    header, rule, untrained, plain, ours = report.format_table(runs).splitlines()
    assert len({len(header), len(rule), len(untrained), len(plain), len(ours)}) == 1
    assert untrained.split("  ")[0] == "untrained encoder"
    assert "50.0 %" in untrained and "25.0 %" in untrained and "12.5 %" in untrained
    assert ours.split()[-6:] == ["0.60", "s", "4.0", "s", "2.0", "MB"]
    assert "1.0000" in plain


def test_gain():
    runs, _ = make_runs()
    assert report.format_gain(*runs[1:]) == (
        "ssl_kernels (native) against plain PyTorch: loss 2.0 times as fast in 1/4.0 of the memory,"
        " whole training 1.50 times as fast"
    )


@pytest.mark.parametrize(
    "classes, trained",
    [(10, ("plain PyTorch", "ssl_kernels (native)")), (12, ("ssl_kernels (chunked)",))],
    ids=["compared", "alone, many classes"],
)
def test_report_writes_figures_and_numbers(classes, trained, tmp_path):
    runs, labels = make_runs(classes, trained)
    settings = Settings("digits", epochs=1, batch_size=8, temperature=0.5, learning_rate=0.1)
    text = report.write_report(runs, labels, settings, "some machine", tmp_path)
    assert ("against" in text) == (len(trained) == 2)
    for name in ("loss.png", "embedding.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("RGB"))
        assert pixels.shape[1] > 600
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # something is drawn
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine"] == "some machine"
    assert results["settings"]["batch_size"] == 8
    assert results["runs"][-1]["losses"] == [4.0, 2.0, 1.0]
    assert results["runs"][-1]["accuracy"] == {"knn": 0.9, "linear": 0.95, "few": 0.8}
