import torch

from ssl_kernels.recipes import data, experiment
from ssl_kernels.recipes.baseline import plain_nt_xent_loss
from ssl_kernels.recipes.engine import Settings
from ssl_kernels.recipes.experiment import measure_loss_memory, prepare_trainings
from ssl_kernels.recipes.memory import peak_memory

MEGABYTE = 250_000  # float32 values


def test_peak_counts_what_lives_together():
    def together():
        first = torch.empty(3 * MEGABYTE)
        second = torch.empty(2 * MEGABYTE)
        return first, second

    def in_turn():
        first = torch.empty(3 * MEGABYTE)
        del first
        return torch.empty(2 * MEGABYTE)

    assert peak_memory(together) == 5_000_000
    assert peak_memory(in_turn) == 3_000_000


def test_peak_leaves_out_what_was_there_before():
    before = torch.empty(4 * MEGABYTE)
    assert peak_memory(lambda: before.add_(1)) < 1000
    assert peak_memory(lambda: None) == 0


def test_plain_loss_holds_several_matrices_of_logits():
    batch_size = 256
    matrix = 4 * (2 * batch_size) ** 2
    settings = Settings("simclr", "digits", epochs=1, batch_size=batch_size, learning_rate=1.0)
    images = data.load_data("digits", batch_size, 0)
    training = prepare_trainings(images, {"plain": plain_nt_xent_loss}, settings)["plain"]
    before = {name: value.clone() for name, value in training.method.state_dict().items()}
    peak = measure_loss_memory(training, next(images.views.epoch(0)))
    assert 2 * matrix < peak < 6 * matrix
    for name, value in training.method.state_dict().items():
        assert torch.equal(value, before[name])  # the training has not moved


def test_of_a_loss_that_is_called_twice_the_larger_peak_counts(monkeypatch):
    settings = Settings("mixco", "digits", epochs=1, batch_size=8, learning_rate=1.0)
    images, peaks = data.load_data("digits", 8, 0), [3, 5]
    training = prepare_trainings(images, {"ours": None}, settings)["ours"]
    monkeypatch.setattr(experiment, "peak_memory", lambda function, device: (function(), peaks.pop())[1])
    assert measure_loss_memory(training, next(images.views.epoch(0))) == 5 and not peaks
