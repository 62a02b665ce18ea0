"""`grad_cache`: the gradients of a whole batch from mini-batches."""

import copy

import pytest
import torch
from torch import nn

import ssl_kernels
from ssl_kernels import backends, grad_cache
from tests.helpers import random_rows

TIGHT = {"rtol": 1e-12, "atol": 1e-14}


class Counted(nn.Module):
    """Adds to a buffer whatever it saw, and multiplies by what it had seen before."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        result = x * self.seen.clone()
        if self.training:
            self.seen += x.detach().mean()
        return result


def encoder(seed=0, buffers=True):
    torch.manual_seed(seed)
    layers = [nn.Linear(5, 8), nn.Dropout(0.4), nn.Tanh(), nn.Linear(8, 4), nn.Dropout(0.2)]
    return nn.Sequential(*layers, *([Counted()] if buffers else [])).double()


def step_in_one(loss, encoders, inputs, size):
    """The same mini-batches, all with their graphs: value and gradients to expect."""
    embeddings = [
        torch.cat([encode(part) for part in given.split(size)])
        for encode, given in zip(encoders, inputs, strict=True)
    ]
    value = loss(*embeddings)
    value.backward()
    return value.detach()


def gradients(*modules):
    return [p.grad for module in modules for p in module.parameters()]


def compare(loss, encoders, inputs, size, learned=()):
    """(value, gradients, buffers, random numbers after it) are those of the whole batch, from equal starts."""
    theirs, ours = encoders, copy.deepcopy(encoders)
    torch.manual_seed(1)
    expected = step_in_one(loss, theirs, inputs, size)
    after, wanted = torch.rand(3), [*gradients(*theirs), *(p.grad for p in learned)]
    for parameter in learned:
        parameter.grad = None
    torch.manual_seed(1)
    value = grad_cache(loss, ours, inputs, size)
    assert not value.requires_grad
    torch.testing.assert_close(value, expected, **TIGHT)
    found = [*gradients(*ours), *(p.grad for p in learned)]
    assert [g is None for g in found] == [g is None for g in wanted]
    for gradient, expectation in zip(found, wanted, strict=True):
        if gradient is not None:
            torch.testing.assert_close(gradient, expectation, **TIGHT)
    assert torch.equal(torch.rand(3), after)
    for ours_of, theirs_of in zip(ours, theirs, strict=True):
        for mine, other in zip(ours_of.buffers(), theirs_of.buffers(), strict=True):
            torch.testing.assert_close(mine, other, **TIGHT)


@pytest.mark.parametrize("size", [1, 3, 4, 7, 9])
def test_gradients_of_the_whole_batch_with_dropout_and_buffers(size):
    x, y = random_rows(7, 5).double(), random_rows(7, 5, seed=1).double()
    scale = nn.Parameter(torch.tensor(5.0, dtype=torch.float64))
    compare(
        lambda a, b: ssl_kernels.clip_loss(a, b, scale),
        [encoder(), encoder(1)],
        [x, y],
        size,
        learned=[scale],
    )


def test_one_encoder_for_two_inputs_and_a_frozen_one():
    x, y = random_rows(6, 5).double(), random_rows(6, 5, seed=1).double()
    shared = encoder(buffers=False)
    theirs = copy.deepcopy(shared)
    torch.manual_seed(1)
    expected = step_in_one(ssl_kernels.nt_xent_loss, [theirs, theirs], [x, y], 2)
    torch.manual_seed(1)
    value = grad_cache(ssl_kernels.nt_xent_loss, [shared, shared], [x, y], 2)
    torch.testing.assert_close(value, expected, **TIGHT)
    for ours, other in zip(gradients(shared), gradients(theirs), strict=True):
        torch.testing.assert_close(ours, other, **TIGHT)

    frozen = encoder(2).requires_grad_(False)
    calls = []
    frozen.register_forward_hook(lambda *_: calls.append(1))
    compare(lambda a, b: ssl_kernels.clip_loss(a, b, 5.0), [encoder(), frozen], [x, y], 2)
    assert len(calls) == 6  # 3 of the expectation; the copy's own are counted by the same hook, once each


class TwoTowers(nn.Module):
    """What open_clip's models return."""

    def __init__(self):
        super().__init__()
        self.image, self.text = encoder(0, buffers=False), encoder(1, buffers=False)
        self.scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))

    def forward(self, image, text, *, double=False):
        return {"image": self.image(image), "text": self.text(text), "scale": self.scale.exp() * (1 + double)}


def test_a_model_with_several_outputs_and_a_scale():
    x, y = random_rows(7, 5).double(), random_rows(7, 5, seed=1).double()
    ours, theirs = TwoTowers(), TwoTowers()
    theirs.load_state_dict(ours.state_dict())

    def loss(out):
        return ssl_kernels.clip_loss(out["image"], out["text"], out["scale"])

    torch.manual_seed(1)
    outputs = [theirs(a, b, double=True) for a, b in zip(x.split(3), y.split(3), strict=True)]
    joined = {name: torch.cat([out[name] for out in outputs]) for name in ("image", "text")}
    expected = loss(joined | {"scale": outputs[-1]["scale"]})
    expected.backward()
    torch.manual_seed(1)
    value = grad_cache(loss, ours, {"image": x, "text": y, "double": True}, 3)
    torch.testing.assert_close(value, expected.detach(), **TIGHT)
    for mine, other in zip(gradients(ours), gradients(theirs), strict=True):
        torch.testing.assert_close(mine, other, **TIGHT)


def test_autocast_reaches_the_weights():
    """The casts that autocast keeps of the pass without a graph would leave the weights without a gradient."""
    x = random_rows(6, 5)
    ours = nn.Linear(5, 4)
    theirs = copy.deepcopy(ours)

    def loss(z):
        return ssl_kernels.nt_xent_loss(*z.chunk(2))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        grad_cache(loss, ours, x, 2)
        expected = loss(torch.cat([theirs(part) for part in x.split(2)]))
    expected.backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=0.02, atol=1e-3)


def test_gradients_of_inputs_scaler_and_no_grad():
    x = random_rows(4, 5).double().requires_grad_()
    module = encoder(buffers=False).eval()

    def loss(z):
        return ssl_kernels.nt_xent_loss(*z.chunk(2))

    expected = loss(module(x))
    (wanted,) = torch.autograd.grad(expected, x)
    value = grad_cache(loss, module, x, 3)
    torch.testing.assert_close(x.grad, wanted, **TIGHT)
    scaled = copy.deepcopy(module)
    scaled.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    torch.testing.assert_close(grad_cache(loss, scaled, x.detach(), 3, scaler=scaler), value, **TIGHT)
    for ours, other in zip(gradients(scaled), gradients(module), strict=True):
        torch.testing.assert_close(ours, 8 * other, **TIGHT)
    with torch.no_grad():
        torch.testing.assert_close(grad_cache(loss, module, x, 3), value, **TIGHT)


def test_graphs_are_of_one_mini_batch():
    """The most that hooks on saved tensors see alive is that of one mini-batch, whatever the batch."""

    def most_alive(rows):
        alive, most = 0, 0

        class Held:
            def __init__(self, tensor):
                nonlocal alive, most
                self.tensor, self.rows = tensor, tensor.shape[0] if tensor.dim() == 2 else 0
                alive += self.rows
                most = max(most, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.rows

        def encode(x):
            with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
                return module(x)

        module = encoder(buffers=False)
        grad_cache(lambda z: ssl_kernels.nt_xent_loss(*z.chunk(2)), encode, random_rows(rows, 5).double(), 8)
        return most

    assert most_alive(64) == most_alive(16) > 0


def test_the_loss_keeps_no_logits():
    limits = []

    def loss(z):
        limits.append(backends.extension.keep_at_most(0))
        return ssl_kernels.nt_xent_loss(*z.chunk(2))

    usual = backends.extension.keep_at_most(1 << 20)
    grad_cache(loss, encoder(), random_rows(4, 5).double(), 2)
    assert limits == [0]
    assert backends.extension.keep_at_most(usual) == 1 << 20


def test_bad_arguments_in_words():
    x, module = random_rows(4, 5).double(), encoder()

    def loss(z):
        return ssl_kernels.nt_xent_loss(*z.chunk(2))

    with pytest.raises(ValueError, match=r"^grad_cache: inputs must be 1, one for each encoder, got 2"):
        grad_cache(loss, [module], [x, x], 2)
    with pytest.raises(ValueError, match=r"^grad_cache: mini_batch_size must be at least 1, got 0"):
        grad_cache(loss, module, x, 0)
    with pytest.raises(TypeError, match=r"^grad_cache: mini_batch_size must be a whole number, .* got 1.5"):
        grad_cache(loss, module, x, 1.5)
    with pytest.raises(
        ValueError,
        match=r"^grad_cache: inputs\[0\] must hold tensors with the same number of rows, got \[3, 4\]",
    ):
        grad_cache(loss, module, (x, x[:3]), 2)
    with pytest.raises(ValueError, match=r"^grad_cache: loss must return one number, got \(4, 4\)"):
        grad_cache(lambda z: z, module, x, 2)
    with pytest.raises(ValueError, match=r"^grad_cache: loss must need a gradient"):
        grad_cache(loss, module.requires_grad_(False), x, 2)
