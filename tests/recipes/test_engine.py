import copy
import dataclasses
import math
import os
import signal

import pytest
import torch
from torch import nn

import ssl_kernels
from ssl_kernels.recipes import data, engine, experiment
from ssl_kernels.recipes.baseline import plain_nt_xent_loss

SETTINGS = engine.Settings(
    "simclr", "digits", epochs=3, batch_size=256, learning_rate=3e-3, options={"temperature": 0.5}
)


def two_steps(settings):
    """Digits for two steps per epoch."""
    images = data.load_data("digits", settings.batch_size, settings.seed)
    images.views.images = images.views.images[:512]
    return images


def train(settings=SETTINGS, loss=None, checkpoint=None, resume=False):
    """(method, history) of a run on the digits."""
    images = two_steps(settings)
    method = experiment.build_method(images, settings)
    training = engine.Training(method, settings, 2 * settings.epochs, loss=loss, checkpoint=checkpoint)
    if resume:
        training.load(2)
    engine.train([training], images.views)
    return method, training.history


@pytest.fixture(scope="module")
def trained():
    return train()


def test_loss_falls(trained):
    _, history = trained
    assert len(history.losses) == len(history.loss_seconds) == 6
    assert history.losses[-1] < history.losses[0] - 0.2
    assert 0 < sum(history.loss_seconds) < history.seconds


def test_the_schedule_is_over_all_steps(trained):
    _, history = trained
    falls = [3e-3 * math.cos(math.pi * step / 12) ** 2 for step in range(6)]
    assert history.rates == pytest.approx([falls[0] / 1.3, *falls[1:]])
    images = two_steps(SETTINGS)
    assert experiment.prepare_trainings(images, {"run": None}, SETTINGS)["run"].steps == 6


def test_plain_loss_trains_the_same(trained):
    _, ours = trained
    _, plain = train(loss=plain_nt_xent_loss)
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
    settings = dataclasses.replace(SETTINGS, seed=1, epochs=1)
    assert train(settings)[1].losses[0] != trained[1].losses[0]


def test_what_steps_draw_depends_on_the_seed():
    images, drawn = two_steps(SETTINGS), []
    for seed in (0, 0, 1):
        settings = dataclasses.replace(SETTINGS, seed=seed)
        training = experiment.prepare_trainings(images, {"run": None}, settings)["run"]
        with training._own_random_numbers():
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn[:2]) and not torch.equal(*drawn[1:])


def test_the_average_follows_what_the_optimizer_has_changed():
    settings = dataclasses.replace(SETTINGS, method="byol", options={"momentum": 0.75})
    images = two_steps(settings)
    training = experiment.prepare_trainings(images, {"run": None}, settings)["run"]
    online, average = training.method.online, training.method.average.module
    before = [parameter.clone() for parameter in average.parameters()]
    training.step(next(images.views.epoch(0)), 2)
    for old, new, found in zip(before, online.parameters(), average.parameters(), strict=True):
        assert not torch.equal(old, new)
        torch.testing.assert_close(found, 0.75 * old + 0.25 * new)


def test_resumed_run_ends_as_the_unbroken_one(trained, tmp_path):
    class Break(Exception):
        pass

    calls = 0

    def breaking_loss(*args):
        nonlocal calls
        calls += 1
        if calls > 4:  # two steps per epoch: in the third
            raise Break
        return ssl_kernels.nt_xent_loss(*args)

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


def trainings_of_both(images, settings, losses, out, resume=False):
    found = []
    for name, loss in losses.items():
        method = experiment.build_method(images, settings)
        method.online.projection.insert(0, nn.Dropout(0.3))  # its steps draw from torch's generator
        path = out / f"{name}.pt"
        found.append(engine.Training(method, settings, 2 * settings.epochs, loss=loss, checkpoint=path))
        if resume:
            found[-1].load(len(images.views))
    return found


def state_of(training):
    history = dataclasses.asdict(training.history)
    return {
        "model": training.method.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "random": dict(training._random),
        "losses": history["losses"],
    }


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def two_losses():
    return {
        "plain": plain_nt_xent_loss,
        "ours": ssl_kernels.nt_xent_loss,
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """(images, what each of two trainings ends with when it runs alone): three epochs of two steps."""
    images = two_steps(SETTINGS)
    ends = []
    for name, loss in two_losses().items():
        (training,) = trainings_of_both(images, SETTINGS, {name: loss}, tmp_path_factory.mktemp(name))
        engine.train([training], images.views)
        ends.append(state_of(training))
    return images, ends


def test_trainings_in_turn_end_as_each_does_alone(alone, tmp_path):
    images, expected = alone
    begun = []

    def noting(name, loss):
        return lambda *args: begun.append(name) or loss(*args)

    losses = {name: noting(name, loss) for name, loss in two_losses().items()}
    trainings = trainings_of_both(images, SETTINGS, losses, tmp_path)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    engine.train(trainings, images.views)
    assert_same([state_of(training) for training in trainings], expected)
    assert torch.equal(torch.get_rng_state(), before)
    # Each goes first as often: the second finds the views in the cache.
    assert begun[::2] == ["ours", "plain", "plain", "ours", "ours", "plain"]
    ours, plain = (training.history for training in trainings)
    assert len(ours.step_seconds) == len(plain.step_seconds) == 6
    assert all(step > loss for step, loss in zip(ours.step_seconds, ours.loss_seconds, strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3], ids=lambda steps: f"after {steps}")
def test_ctrl_c_goes_on_where_it_stopped(alone, tmp_path, steps):
    """Held back until both trainings have made the step."""
    images, expected = alone
    losses = two_losses()
    calls = 0

    def interrupting_loss(*args):
        nonlocal calls
        calls += 1
        if calls == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return two_losses()["plain"](*args)

    with pytest.raises(KeyboardInterrupt):
        engine.train(
            trainings_of_both(images, SETTINGS, losses | {"plain": interrupting_loss}, tmp_path), images.views
        )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    trainings = trainings_of_both(images, SETTINGS, losses, tmp_path, resume=True)
    assert [(training.epoch, training.batch) for training in trainings] == [divmod(steps, 2)] * 2
    engine.train(trainings, images.views)
    assert_same([state_of(training) for training in trainings], expected)


@pytest.mark.parametrize("call, at", [(2, (0, 0)), (4, (1, 0))], ids=["first epoch", "second epoch"])
def test_an_interrupt_in_the_middle_of_a_step_leaves_what_was_whole(alone, tmp_path, call, at):
    """As the second Ctrl-C does, or one outside the main thread. The other training keeps its own place, and they meet
    again."""
    images, expected = alone
    losses = two_losses()
    calls = 0

    def breaking_loss(*args):
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return two_losses()["plain"](*args)

    with pytest.raises(KeyboardInterrupt):
        engine.train(
            trainings_of_both(images, SETTINGS, losses | {"plain": breaking_loss}, tmp_path), images.views
        )
    assert not list(tmp_path.glob("*.partial"))
    trainings = trainings_of_both(images, SETTINGS, losses, tmp_path, resume=True)
    places = [(training.epoch, training.batch) for training in trainings]
    assert places[0] == at and places[1] > at
    engine.train(trainings, images.views)
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
    settings = dataclasses.replace(SETTINGS, epochs=1)
    train(settings, checkpoint=checkpoint)
    changed = dataclasses.replace(settings, options={"temperature": 0.1})
    with pytest.raises(ValueError, match=r"--resume: temperature must be 0\.5 as in .*run\.pt, got 0\.1"):
        train(changed, checkpoint=checkpoint, resume=True)


def test_a_step_makes_the_ordinary_update():
    """That of plain PyTorch, with the optimizer's own defaults but for rate and decay."""
    settings = dataclasses.replace(SETTINGS, optimizer="sgd", weight_decay=0.01)
    images = two_steps(settings)
    method = experiment.build_method(images, settings)
    ordinary = copy.deepcopy(method)
    batch = next(images.views.epoch(0))
    training = engine.Training(method, settings, steps=6)
    method.online.projection[0].weight.grad = torch.full_like(method.online.projection[0].weight, 1e3)
    training.method.criterion.seconds = 50.0  # of calls before
    training.step(batch, 2, views_seconds=1000.0)
    assert 0 < training.history.loss_seconds[0] < 50 and 1000 < training.history.step_seconds[0] < 2000

    rate = training.history.rates[0]
    optimizer = torch.optim.SGD(ordinary.parameters(), lr=rate, momentum=0.9, weight_decay=0.01)
    loss = plain_nt_xent_loss(*ordinary.online(torch.cat(batch.views)).chunk(2), 0.5)
    loss.backward()
    optimizer.step()
    assert training.history.losses[0] == pytest.approx(loss.item(), rel=1e-6)
    for ours, expected in zip(method.parameters(), ordinary.parameters(), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_checkpoint_is_as_large_as_was_told(tmp_path):
    images = two_steps(SETTINGS)
    (training,) = trainings_of_both(images, SETTINGS, {"ours": ssl_kernels.nt_xent_loss}, tmp_path)
    training.step(next(images.views.epoch(0)), 2)
    training.save()
    assert training.checkpoint.stat().st_size == pytest.approx(training.bytes_of_checkpoint, rel=0.2)


def test_the_encoder_is_compiled_where_that_is_asked_for(monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    images = two_steps(SETTINGS)
    for asked in (False, True):
        method = experiment.build_method(images, SETTINGS)
        engine.Training(method, dataclasses.replace(SETTINGS, compile=asked), 2)
        assert compiled == [method.encoder] * asked


def test_ctrl_c_pressed_again_interrupts_at_once():
    with engine._held_back_interrupt() as is_interrupted:
        assert not is_interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert is_interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_trial_leaves_the_training_as_it_was():
    """Of a method that keeps keys, an average and statistics; and torch's generator."""
    settings = dataclasses.replace(SETTINGS, method="moco", options={"queue_size": 50})
    images = two_steps(settings)
    training = experiment.prepare_trainings(images, {"run": None}, settings)["run"]
    before, random = copy.deepcopy(state_of(training)), torch.get_rng_state()
    experiment.rehearse(training, images)
    assert_same(state_of(training), before)
    assert torch.equal(torch.get_rng_state(), random)


def test_what_is_judged(monkeypatch):
    """Pixels, the encoder before and the one after, each by the training images on the held-out ones."""
    images, judged = two_steps(SETTINGS), []

    def extract_features(encoder, batches):
        which = "train" if batches is images.train else "test" if batches is images.test else None
        judged.append((encoder, which))
        return which, None

    monkeypatch.setattr(experiment, "extract_features", extract_features)
    monkeypatch.setattr(experiment, "evaluate_features", lambda train, test: (train[0], test[0]))
    monkeypatch.setattr(experiment, "train", lambda *_: None)
    monkeypatch.setattr(experiment, "measure_loss_memory", lambda *_: 17)
    settings = dataclasses.replace(SETTINGS, seed=3)
    trainings = experiment.prepare_trainings(images, {"ours": None}, settings)
    runs, _ = experiment.run_experiment(images, trainings, settings)
    assert [(run.name, run.accuracy, run.features) for run in runs] == [
        (name, ("train", "test"), "test") for name in ("raw pixels", "untrained encoder", "ours")
    ]
    assert [which for _, which in judged] == ["train", "test"] * 3
    pixels, untrained, trained = (encoder for encoder, _ in judged[::2])
    assert torch.equal(pixels(torch.ones(2, 1, 3, 3)), torch.ones(2, 9))
    begin = experiment.build_encoder(images, 3, "simclr")
    assert_same(dict(untrained.state_dict()), dict(begin.state_dict()))
    assert trained is trainings["ours"].method.encoder and runs[-1].peak_bytes == 17
    colours = dataclasses.replace(images, channels=3)
    runs, _ = experiment.run_experiment(colours, {}, settings)
    assert [run.name for run in runs] == ["untrained encoder"]


def test_parts_of_a_batch_add_up():
    """Supervised, in evaluation mode of the normalisations: rows do not see each other, and the parts are the whole."""
    settings = dataclasses.replace(SETTINGS, method="supervised", options={}, optimizer="sgd")
    images = data.load_data("digits", 10, 0, views=1)
    batch = next(images.views.epoch(0))
    ends = []
    for accumulate in (1, 3):
        settings = dataclasses.replace(settings, accumulate=accumulate)
        method = experiment.build_method(images, settings)
        training = engine.Training(method, settings, steps=2)
        for module in method.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        method.encoder.train = lambda mode: None
        training.step(batch, 1)
        history = training.history
        ends.append((history.losses, history.spreads, history.ranks, dict(method.named_parameters())))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


def test_bfloat16_trains_nearly_as_float32(trained):
    settings = dataclasses.replace(SETTINGS, precision="bfloat16")
    _, history = train(settings)
    assert history.losses != trained[1].losses
    assert history.losses == pytest.approx(trained[1].losses, rel=0.02)


def test_the_log_has_a_line_a_step(tmp_path):
    _, history = train(checkpoint=tmp_path / "run.pt")
    header, *lines = [line.split(",") for line in (tmp_path / "run.csv").read_text().splitlines()]
    assert header[:4] == ["step", "epoch", "loss", "learning_rate"]
    assert [(int(line[0]), int(line[1])) for line in lines] == [
        (step + 1, step // 2 + 1) for step in range(6)
    ]
    assert [float(line[2]) for line in lines] == history.losses
    spreads = [line[header.index("spread")] for line in lines]
    assert spreads[::2] == [""] * 3
    assert [float(value) for value in spreads[1::2]] == history.spreads
