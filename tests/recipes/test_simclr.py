import copy
import functools
import os
import signal

import pytest
import torch
from torch import nn

import ssl_kernels
from ssl_kernels.recipes import data, experiment, simclr
from ssl_kernels.recipes.baseline import plain_nt_xent_loss

SETTINGS = simclr.Settings("digits", epochs=3, batch_size=256, temperature=0.5, learning_rate=3e-3)


def train(settings=SETTINGS, loss=None, **options):
    """(model, history) of a run on the digits."""
    images = data.load_data("digits", settings.batch_size, settings.seed)
    images.views.images = images.views.images[:512]  # two steps an epoch
    model = experiment.build_model(images, settings.seed)
    loss = loss or ssl_kernels.nn.NTXentLoss(settings.temperature)
    return model, simclr.pretrain(model, loss, images.views, settings, **options)


@pytest.fixture(scope="module")
def trained():
    return train()


def test_loss_falls(trained):
    _, history = trained
    assert len(history.losses) == len(history.loss_seconds) == 6
    assert history.losses[-1] < history.losses[0] - 0.2
    assert 0 < sum(history.loss_seconds) < history.seconds


def test_plain_loss_trains_the_same(trained):
    _, ours = trained
    _, plain = train(loss=functools.partial(plain_nt_xent_loss, temperature=0.5))
    assert plain.losses[0] == pytest.approx(ours.losses[0], rel=1e-6)
    assert plain.losses == pytest.approx(ours.losses, rel=1e-3)


def test_same_seed_gives_the_same_run(trained):
    model, history = trained
    torch.rand(3)  # nothing hangs on the global generator
    again, same = train()
    assert same.losses == history.losses
    for value, other in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other)


def test_another_seed_gives_another_run(trained):
    settings = simclr.dataclasses.replace(SETTINGS, seed=1, epochs=1)
    assert train(settings)[1].losses[0] != trained[1].losses[0]


def test_resumed_run_ends_as_the_unbroken_one(trained, tmp_path):
    class Break(Exception):
        pass

    calls = 0

    def breaking_loss(z0, z1):
        nonlocal calls
        calls += 1
        if calls > 4:  # two steps an epoch: in the third
            raise Break
        return ssl_kernels.nt_xent_loss(z0, z1, 0.5)

    checkpoint = tmp_path / "run.pt"
    with pytest.raises(Break):
        train(loss=breaking_loss, checkpoint=checkpoint)
    model, history = train(checkpoint=checkpoint, resume=True)
    whole_model, whole = trained
    assert history.losses == whole.losses
    assert len(history.loss_seconds) == 6
    for value, other in zip(model.state_dict().values(), whole_model.state_dict().values(), strict=True):
        assert torch.equal(value, other)
    assert not list(tmp_path.glob("*.partial"))


def with_dropout(model):
    """A model whose steps draw from torch's generator."""
    model.projection.insert(0, nn.Dropout(0.3))
    return model


def trainings_of_both(images, settings, losses, out, resume=False):
    found = []
    for name, loss in losses.items():
        model = with_dropout(experiment.build_model(images, settings.seed))
        found.append(simclr.Training(model, loss, settings, checkpoint=out / f"{name}.pt"))
        if resume:
            found[-1].load(len(images.views))
    return found


def state_of(training):
    history = simclr.dataclasses.asdict(training.history)
    return {
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "random": dict(training._random),
        "losses": history["losses"],
    }


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def two_losses():
    return {
        "plain": functools.partial(plain_nt_xent_loss, temperature=0.5),
        "ours": ssl_kernels.nn.NTXentLoss(0.5),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(images, what each of two trainings ends with when it runs alone): three epochs of two steps."""
    images = data.load_data("digits", SETTINGS.batch_size, SETTINGS.seed)
    images.views.images = images.views.images[:512]
    ends = []
    for name, loss in two_losses().items():
        (training,) = trainings_of_both(images, SETTINGS, {name: loss}, tmp_path_factory.mktemp(name))
        simclr.train([training], images.views)
        ends.append(state_of(training))
    return images, ends


def test_trainings_in_turn_end_as_each_does_alone(alone, tmp_path):
    images, expected = alone
    trainings = trainings_of_both(images, SETTINGS, two_losses(), tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    simclr.train(trainings, images.views)
    assert_same([state_of(training) for training in trainings], expected)
    assert torch.equal(torch.get_rng_state(), before)
    ours, plain = (training.history for training in trainings)
    assert len(ours.step_seconds) == len(plain.step_seconds) == 6
    assert all(step > loss for step, loss in zip(ours.step_seconds, ours.loss_seconds, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3], ids=lambda steps: f"after {steps}")
def test_ctrl_c_goes_on_where_it_stopped(alone, tmp_path, steps):
    """Held back until both trainings have made the step."""
    images, expected = alone
    losses = two_losses()
    calls = 0

    def interrupting_loss(z0, z1):
        nonlocal calls
        calls += 1
        if calls == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return two_losses()["plain"](z0, z1)

    with pytest.raises(KeyboardInterrupt):
        simclr.train(
            trainings_of_both(images, SETTINGS, losses | {"plain": interrupting_loss}, tmp_path), images.views
        )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trainings = trainings_of_both(images, SETTINGS, losses, tmp_path, resume=True)
    assert [(training.epoch, training.batch) for training in trainings] == [divmod(steps, 2)] * 2
    simclr.train(trainings, images.views)
    assert_same([state_of(training) for training in trainings], expected)


@pytest.mark.parametrize("call, at", [(2, (0, 0)), (4, (1, 0))], ids=["first epoch", "second epoch"])
def test_an_interrupt_in_the_middle_of_a_step_leaves_what_was_whole(alone, tmp_path, call, at):
    """As the second Ctrl-C does, or one outside the main thread. The other training keeps its own place, and they meet
    again."""
    images, expected = alone
    losses = two_losses()
    calls = 0

    def breaking_loss(z0, z1):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return two_losses()["plain"](z0, z1)

    with pytest.raises(KeyboardInterrupt):
        simclr.train(
            trainings_of_both(images, SETTINGS, losses | {"plain": breaking_loss}, tmp_path), images.views
        )
    assert not list(tmp_path.glob("*.partial"))
    trainings = trainings_of_both(images, SETTINGS, losses, tmp_path, resume=True)
    places = [(training.epoch, training.batch) for training in trainings]
    assert places[0] == at and places[1] > at
    simclr.train(trainings, images.views)
    assert_same([state_of(training) for training in trainings], expected)


def test_a_checkpoint_that_cannot_be_used_changes_nothing(alone, tmp_path):
    images, _ = alone
    (training,) = trainings_of_both(images, SETTINGS, {"ours": two_losses()["ours"]}, tmp_path)
    training.save()
    state = torch.load(training.checkpoint, weights_only=True)
    for name in list(state["model"])[:-1]:
        state["model"][name] = state["model"][name] + 1
    state["model"][name] = torch.zeros(3)  # the last one does not fit
    torch.save(state, training.checkpoint)
    before = copy.deepcopy(state_of(training))
    with pytest.raises(
        ValueError, match=r"--resume: .*ours\.pt must hold the model of this run, got another"
    ):
        training.load(len(images.views))
    assert_same(state_of(training), before)


def test_resume_refuses_other_settings(tmp_path):
    checkpoint = tmp_path / "run.pt"
    settings = simclr.dataclasses.replace(SETTINGS, epochs=1)
    train(settings, checkpoint=checkpoint)
    changed = simclr.dataclasses.replace(settings, temperature=0.1)
    with pytest.raises(ValueError, match=r"--resume: temperature must be 0\.5 as in .*run\.pt, got 0\.1"):
        train(changed, checkpoint=checkpoint, resume=True)


def test_train_step_makes_the_ordinary_update():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    ordinary = copy.deepcopy(model)
    view0, view1 = torch.rand(2, 10, 1, 8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[1].weight.grad = torch.full_like(model[1].weight, 1e3)  # of an earlier step: must not count
    value, seconds = simclr.train_step(model, plain_nt_xent_loss, optimizer, view0, view1)

    loss = plain_nt_xent_loss(ordinary(view0), ordinary(view1))
    loss.backward()
    torch.optim.SGD(ordinary.parameters(), lr=0.1).step()
    assert value == pytest.approx(loss.item(), rel=1e-6)
    assert seconds > 0
    torch.testing.assert_close(model[1].weight, ordinary[1].weight)
    torch.testing.assert_close(model[1].bias, ordinary[1].bias)


def test_learning_rate_rises_and_falls():
    optimizer = torch.optim.AdamW([torch.zeros(1)], lr=9.0)
    rates = []
    for step in range(100):
        simclr.set_learning_rate(optimizer, SETTINGS, step, 100)
        rates.append(optimizer.param_groups[0]["lr"])
    top = rates.index(max(rates))
    assert 0.9 * 3e-3 < max(rates) <= 3e-3
    assert 3 <= top <= 6
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[-1] < 1e-5
