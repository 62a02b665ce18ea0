"""The MoCo recipe: it learns, repeats itself, and goes on from a checkpoint with the same losses."""

import argparse
import dataclasses
import os
import signal
import tempfile

import pytest
import torch

import ssl_kernels
from ssl_kernels.nn import MoCoQueue
from ssl_kernels.recipes import data, engine, experiment, pretrain
from ssl_kernels.recipes.baseline import plain_moco_loss
from tests.helpers import random_rows

SETTINGS = engine.Settings(
    "moco",
    "digits",
    epochs=3,
    batch_size=256,
    learning_rate=3e-3,
    options={
        "temperature": 0.2,
        "queue_size": 700,
        "momentum": 0.9,
    },  # 700: no multiple of the 512 keys of a step
)


def train(settings=SETTINGS, loss=None, checkpoint=None, resume=False):
    """(method, history) of a run on the digits, two steps per epoch."""
    images = data.load_data("digits", settings.batch_size, settings.seed)
    images.views.images = images.views.images[:512]
    losses = {"run": loss}
    options = {"out": checkpoint.parent, "resume": resume} if checkpoint else {}
    training = experiment.prepare_trainings(images, losses, settings, **options)["run"]
    engine.train([training], images.views)
    return training.method, training.history


@pytest.fixture(scope="module")
def trained():
    return train()


def test_queue_fills_and_average_follows(trained):
    model, history = trained
    assert len(history.losses) == 6
    assert history.losses[0] == pytest.approx(0, abs=1e-6)  # the queue is empty
    assert history.losses[5] < history.losses[2]
    assert len(model.queue) == 700
    assert model.queue.position.item() == 6 * 512 % 700
    assert model.average.updates == 6
    for average, parameter in zip(model.average.module.parameters(), model.online.parameters(), strict=True):
        assert not torch.equal(average, parameter)
        assert not average.requires_grad


def test_plain_loss_trains_the_same(trained):
    _, ours = trained
    _, plain = train(loss=plain_moco_loss)
    assert plain.losses == pytest.approx(ours.losses, rel=1e-3, abs=1e-6)


def test_resumed_run_ends_as_the_unbroken_one(trained, tmp_path):
    class Break(Exception):
        pass

    calls = 0

    def breaking_loss(*args, **options):
        nonlocal calls
        calls += 1
        if calls > 4:  # in the third epoch
            raise Break
        return ssl_kernels.moco_loss(*args, **options)

    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Break):
        train(loss=breaking_loss, checkpoint=checkpoint)
    model, history = train(checkpoint=checkpoint, resume=True)
    whole_model, whole = trained
    assert history.losses == whole.losses
    for name, value in model.state_dict().items():
        if torch.is_tensor(value):
            assert torch.equal(value, whole_model.state_dict()[name]), name
    assert model.average.updates == 6


def test_ctrl_c_in_the_middle_of_an_epoch_keeps_queue_and_average(trained, tmp_path):
    calls = 0

    def interrupting_loss(*args, **options):
        nonlocal calls
        calls += 1
        if calls == 3:  # the first step of the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return ssl_kernels.moco_loss(*args, **options)

    checkpoint = tmp_path / "run.pt"
    with pytest.raises(KeyboardInterrupt):
        train(loss=interrupting_loss, checkpoint=checkpoint)
    state = torch.load(checkpoint, weights_only=True)
    assert (state["epoch"], state["batch"]) == (1, 1)
    model, history = train(checkpoint=checkpoint, resume=True)
    whole_model, whole = trained
    assert history.losses == whole.losses
    torch.testing.assert_close(model.state_dict(), whole_model.state_dict(), rtol=0, atol=0)


def test_resume_refuses_another_queue(tmp_path):
    checkpoint = tmp_path / "run.pt"
    settings = dataclasses.replace(SETTINGS, epochs=1)
    train(settings, checkpoint=checkpoint)
    changed = dataclasses.replace(settings, options=settings.options | {"queue_size": 800})
    with pytest.raises(ValueError, match=r"--resume: queue_size must be 700 as in .*run\.pt, got 800"):
        train(changed, checkpoint=checkpoint, resume=True)


def test_plain_loss_is_the_fused_one():
    queue = MoCoQueue(40, 8)
    for _ in range(2):
        query, key = random_rows(10, 8).requires_grad_(), random_rows(10, 8, seed=1)
        losses = [
            ssl_kernels.moco_loss(query, key, queue, 0.2, symmetric=True),
            plain_moco_loss(query, key, queue, 0.2),
        ]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*(torch.autograd.grad(loss, query)[0] for loss in losses))
        queue.push_(random_rows(30, 8, seed=2))


@pytest.mark.slow
def test_reaches_the_accuracy_of_simclr():
    """k-NN accuracy on the held-out digits, each recipe with its defaults: at most two points below."""
    accuracy = {}
    for method in ("simclr", "moco"):
        arguments = argparse.ArgumentParser()
        pretrain.add_arguments(arguments)
        with tempfile.TemporaryDirectory() as out:
            options = [
                "--method",
                method,
                "--no-compare",
                "--device",
                "cpu",
                "--backend",
                "chunked",
                "--out",
                out,
            ]
            settings, device, images, trainings = pretrain.set_up(arguments.parse_args(options))
            runs, _ = experiment.run_experiment(images, trainings, settings, device=device)
        accuracy[method] = runs[-1].accuracy.knn
    assert accuracy["moco"] >= accuracy["simclr"] - 0.02, accuracy
