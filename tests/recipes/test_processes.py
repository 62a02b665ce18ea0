"""Training over two processes is that of one on the joined batch, step by step."""

import copy

import pytest
import torch
from torch import distributed as dist

from ssl_kernels import swav_loss, triplet_loss
from ssl_kernels.cli import main
from ssl_kernels.recipes import data, engine, experiment, processes
from ssl_kernels.recipes.ranks import over_ranks, with_global_batch_norm
from tests.helpers import random_rows


def test_losses_and_weights_follow_the_run_of_one_process():
    settings = engine.Settings("simclr", "digits", epochs=1, batch_size=101, learning_rate=3e-3)
    images = {"name": "digits", "batch_size": 101, "seed": 0}
    loaded = data.load_data(**images)
    method = experiment.build_method(loaded, settings).double()
    one = engine.Training(method, settings, steps=13)
    engine.train([one], loaded.views)
    trained, history = processes.run_in_processes(2, settings, images, dtype=torch.float64)
    assert len(history.losses) == len(one.history.losses) == 13
    assert history.losses == pytest.approx(one.history.losses, rel=1e-9)
    expected = one.method.state_dict()
    for name, value in trained.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8)


def test_a_loss_over_a_group_can_be_copied():
    """The trial of a method before the work is of a copy, and a process group cannot be copied."""
    features, prototypes = random_rows(8, 4).view(2, 4, 4), random_rows(6, 4, seed=1)
    rows, labels = random_rows(8, 4), torch.arange(8) % 3
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        loss = copy.deepcopy(over_ranks(swav_loss))
        assert loss(features, prototypes) == swav_loss(features, prototypes, group=dist.group.WORLD)
        mined = copy.deepcopy(over_ranks(triplet_loss))(rows, labels, mining="semi_hard")
        assert mined == triplet_loss(rows, labels, mining="semi_hard") != triplet_loss(rows, labels)
    finally:
        dist.destroy_process_group()


def test_in_evaluation_the_statistics_are_the_running_ones():
    """As of torch's, without a word to the other ranks."""
    ordinary = torch.nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        for tensor in (*ordinary.parameters(), *ordinary.buffers()):
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    images = random_rows(4, 12).view(4, 3, 2, 2)
    expected = ordinary(images)
    before = copy.deepcopy(ordinary.state_dict())
    torch.testing.assert_close(with_global_batch_norm(ordinary)(images), expected, rtol=0, atol=0)
    torch.testing.assert_close(ordinary.state_dict(), before, rtol=0, atol=0)


@pytest.mark.slow  # two more processes that import torch
def test_command_line(tmp_path, capsys):
    options = ["--processes", "2", "--epochs", "1", "--batch-size", "256", "--out", str(tmp_path)]
    assert main(["pretrain", *options]) == 0
    printed = capsys.readouterr().out
    assert "1 process " in printed
    assert "2 processes" in printed
    assert "largest difference of the losses in the first 5 steps" in printed
    with pytest.raises(SystemExit):
        main(["pretrain", *options, "--resume"])
    assert "--resume must be left out with --processes" in capsys.readouterr().err
