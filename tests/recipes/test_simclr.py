import copy
import functools

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
