"""Every method learns, goes on bit for bit where it was interrupted, and says so when its embeddings collapse."""

import itertools
import logging
import os
import signal
from types import SimpleNamespace

import pytest
import torch

import ssl_kernels
from ssl_kernels.recipes import data, engine, experiment
from ssl_kernels.recipes.methods import METHODS, find_method, options_of
from ssl_kernels.recipes.methods.byol import BYOL
from ssl_kernels.recipes.methods.jigsaw import ORDERS, lay_tiles

DEFAULT = ("mixco", "manifold-mixup", "dino")
QUICK = [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in METHODS]


def make(name, out, epochs=2, images=96, loss=None, **settings):
    """(training, views) of a tiny run: batches of 32 digits."""
    method = find_method(name)
    loaded = data.load_data("digits", 32, 0, views=method.views, crops=method.crops)
    loaded.views.images, loaded.views.labels = (
        whole[:images] for whole in (loaded.views.images, loaded.views.labels)
    )
    options = options_of(method)
    if "queue_size" in options:
        options["queue_size"] = 50
    settings = engine.Settings(name, "digits", epochs, 32, 3e-3, options=options, **settings)
    resume = out is not None and (out / "run.pt").exists()
    training = experiment.prepare_trainings(loaded, {"run": loss}, settings, out=out, resume=resume)["run"]
    return training, loaded.views


def end_of(training):
    return {
        "method": training.method.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "schedule": training.schedule.state_dict(),
        "random": dict(training._random),
        "losses": training.history.losses,
        "spreads": training.history.spreads,
    }


@pytest.mark.parametrize("name", QUICK)
def test_interrupted_and_resumed_run_is_the_unbroken_one(name, tmp_path):
    """Ctrl-C in the second step of the first epoch and in the last of all."""
    unbroken, views = make(name, None)
    engine.train([unbroken], views)
    for stop in (2, 4):
        broken, views = make(name, tmp_path)
        update, calls = broken._update, iter(range(stop - 1, -1, -1))

        def interrupted(batch, update=update, calls=calls):
            if next(calls) == 0:
                os.kill(os.getpid(), signal.SIGINT)
            return update(batch)

        broken._update = interrupted
        with pytest.raises(KeyboardInterrupt):
            engine.train([broken], views)
    resumed, views = make(name, tmp_path)
    assert len(resumed.history.losses) == 6
    engine.train([resumed], views)
    torch.testing.assert_close(end_of(resumed), end_of(unbroken), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_healthy_run_learns_without_a_warning(name, caplog):
    """On a fixed batch the loss falls below where it began; MoCo's begins at 0 with an empty queue."""
    training, views = make(name, None, epochs=30)
    engine.train([training], views)
    losses = training.history.losses
    begin = losses[3:9] if "queue_size" in training.settings.options else losses[:6]
    assert sum(losses[-6:]) < sum(begin)
    assert not caplog.records


def test_collapse_is_warned_of(caplog):
    """BYOL with neither predictor nor stop-gradient: agreement alone, which constant embeddings reach."""

    class Collapsing(BYOL):
        def forward(self, batch):
            z0, z1 = self.online(torch.cat(batch.views)).chunk(2)
            return self.criterion(z0, z1)

    def loss(z0, z1):
        return (2 - 2 * torch.nn.functional.cosine_similarity(z0, z1)).mean()

    loaded = data.load_data("digits", 128, 0)
    loaded.views.images = loaded.views.images[:256]
    settings = engine.Settings("byol", "digits", 12, 128, 1e-2)
    method = Collapsing(experiment.build_encoder(loaded, 0, "byol"), loaded)
    training = engine.Training(method, settings, 12 * 2, loss=loss)
    with caplog.at_level(logging.WARNING, "ssl_kernels.recipes"):
        engine.train([training], loaded.views)
    (record,) = caplog.records  # once, not in every epoch
    assert record.getMessage().startswith("byol: collapse at epoch ")

    caplog.clear()
    healthy = engine.Training(experiment.build_method(loaded, settings), settings, 12 * 2)
    engine.train([healthy], loaded.views)
    assert not caplog.records
    assert healthy.history.spreads[-1] > 5 * training.history.spreads[-1]


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_a_method_is_trained(name):
    """One step gives each a gradient; averages have none."""
    training, views = make(name, None)
    training.step(next(views.epoch(0)), 3)
    for parameter_name, parameter in training.method.named_parameters():
        is_average = parameter_name.startswith("average")
        assert (parameter.grad is None) == is_average, parameter_name


@pytest.mark.parametrize("name", ["simclr", "swav", "dino"])
def test_collapse_is_looked_for_in_the_views(name):
    """Not in the crops, of which there are as many."""
    training, views = make(name, None, accumulate=2)
    batch = next(views.epoch(0))
    with torch.no_grad():
        expected = [training.method.online(torch.cat(part.views)) for part in batch.parts(2)]
    training.step(batch, 3)
    torch.testing.assert_close(training._watch.embeddings(), torch.cat(expected))


def test_methods_use_the_backend_that_is_asked_for():
    """Each criterion that is a loss of this library takes a backend."""
    for name in METHODS:
        criterion = find_method(name).criterion
        if criterion is not torch.nn.functional.cross_entropy:
            assert criterion is getattr(ssl_kernels, criterion.__name__)


@pytest.mark.parametrize("name, size", [("jigsaw", 33), ("mae", 37)])
def test_images_that_cannot_be_cut_into_tiles(name, size):
    images = SimpleNamespace(channels=3, image_size=size, classes=2)
    options = options_of(find_method(name))
    with pytest.raises(ValueError, match=f"--image-size must .* for --method {name}, got {size}"):
        experiment.build_method(images, engine.Settings(name, "folder", 1, 2, 1e-3, options=options))


def test_tiles_are_laid_in_the_given_order():
    image = torch.arange(2 * 4 * 4).view(1, 2, 4, 4)
    for order in ORDERS:
        laid = lay_tiles(image, torch.tensor([order]))
        corners = list(itertools.product((slice(0, 2), slice(2, 4)), repeat=2))
        for place, tile in enumerate(order):
            assert torch.equal(laid[..., *corners[place]], image[..., *corners[tile]])
    assert len(set(ORDERS)) == 24
