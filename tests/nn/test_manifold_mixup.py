"""`nn.ManifoldMixup`: hidden features mixed inside a model, compiled, computed again in backward or neither."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssl_kernels.nn import ManifoldMixup


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5))


class Net(nn.Module):
    """Three layers that do not commute with mixing; `run` runs a part of it, as it is or in a checkpoint."""

    def __init__(self, run=None, whole=False):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 7), nn.Linear(7, 7), nn.Linear(7, 5)
        self.run, self.whole = run or (lambda part, x: part(x)), whole

    def body(self, x):
        return torch.tanh(self.b(torch.tanh(self.a(x))))

    def forward(self, x):
        x = x.sin()
        if self.whole:
            return self.c(self.run(self.body, x))
        return self.c(torch.tanh(self.run(self.b, torch.tanh(self.run(self.a, x)))))


def by_definition(net, chosen, x, permutation, lam):
    """The output with one layer mixed, of plain PyTorch."""

    def mixed(name, values):
        share = lam[:, None]
        return share * values + (1 - share) * values[permutation] if name == chosen else values

    x = mixed("input", x).sin()
    a = torch.tanh(mixed("a", F.linear(x, net.a.weight, net.a.bias)))
    b = torch.tanh(mixed("b", F.linear(a, net.b.weight, net.b.bias)))
    return mixed("c", F.linear(b, net.c.weight, net.c.bias))


LAYERS = ("input", "a", "b", "c")


def which_layer(net, x, output, permutation, lam):
    """The one layer that was mixed, found by the output."""
    found = [
        name
        for name in LAYERS
        if torch.allclose(output, by_definition(net, name, x, permutation, lam), atol=1e-5)
    ]
    assert len(found) == 1, found
    return found[0]


def check_mixes(call, net, calls=12, batches=(8, 5), grads=False):
    """Every call mixes exactly one layer, each layer in turn, and its gradients are those of the definition."""
    seen, size = set(), max(batches)
    for step in range(calls):
        torch.manual_seed(step)
        batch = batches[step % len(batches)]
        x, target = torch.randn(size, 6)[:batch], torch.arange(batch)
        net.zero_grad()
        output, (_, permutation, lam) = call(x, target)
        if torch.equal(permutation, target):
            continue  # nobody meets another
        chosen = which_layer(net, x, output, permutation, lam)
        seen.add(chosen)
        if grads:
            output.square().sum().backward()
            found = [p.grad.clone() for p in net.parameters()]
            net.zero_grad()
            by_definition(net, chosen, x, permutation, lam).square().sum().backward()
            for ours, p in zip(found, net.parameters(), strict=True):
                torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-5)
    assert seen == set(LAYERS)


def test_manifold_mixup_mixes_one_layer():
    net = Net()
    check_mixes(ManifoldMixup(net, ["a", "b", "c"], mode="sample", generator=3), net, grads=True)


# Compiled


def graphs_counted():
    """A backend for torch.compile and the list of its graphs."""
    graphs = []

    def backend(graph, _inputs):
        graphs.append(graph)
        return graph.forward

    return backend, graphs


@pytest.fixture(autouse=True)
def no_compiled_code():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def wrapped_net(net, backend):
    return torch.compile(net, backend=backend, fullgraph=True)


def net_in_place(net, backend):
    net.compile(backend=backend, fullgraph=True)
    return net


def wrapped_layers(net, backend):
    net.a, net.b = (torch.compile(layer, backend=backend, fullgraph=True) for layer in (net.a, net.b))
    return net


def layers_in_place(net, backend):
    for layer in (net.a, net.b):
        layer.compile(backend=backend, fullgraph=True)
    return net


@pytest.mark.parametrize("compiled", [wrapped_net, net_in_place, wrapped_layers, layers_in_place])
@pytest.mark.parametrize("when", ["new", "called before", "compiled later"])
def test_a_compiled_model_mixes(compiled, when):
    """In whole or in part, by `torch.compile` or in place, before or after it was called plainly or was wrapped."""
    net, late = Net(), when == "compiled later"
    backend, graphs = graphs_counted()
    model = net if late else compiled(net, backend)
    x = torch.randn(8, 6)
    plain = net(x)
    if when == "called before":
        model(x), model(x)
    module = ManifoldMixup(model, ["a", "b", "c"], mode="sample", generator=3)
    if late:
        module.module = compiled(net, backend)
        torch.testing.assert_close(module.eval()(x), plain)
        module.train()
    check_mixes(module, Plain(net))
    torch.testing.assert_close(module.eval()(x), plain)
    torch.testing.assert_close(model(x), plain)
    assert 0 < len(graphs) <= (4 if compiled in (wrapped_net, net_in_place) else 8)


class Plain:
    """The parameters of a Net whose layers may be wrapped."""

    def __init__(self, net):
        self.a, self.b, self.c = (getattr(layer, "_orig_mod", layer) for layer in (net.a, net.b, net.c))

    def parameters(self):
        return [p for layer in (self.a, self.b, self.c) for p in layer.parameters()]

    def zero_grad(self):
        for p in self.parameters():
            p.grad = None


@pytest.mark.parametrize("generator, before", [(None, True), (3, False), ("generator", True)])
def test_compiled_as_a_whole(generator, before):
    net = Net()
    if generator == "generator":
        generator = torch.Generator().manual_seed(4)
    module = ManifoldMixup(net, ["a", "b", "c"], mode="sample", generator=generator)
    if before:
        module(torch.randn(8, 6), torch.arange(8))
    backend, graphs = graphs_counted()
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    check_mixes(compiled, net, calls=16, batches=(8, 5, 6, 7))

    assert len(graphs) <= 3
    check_mixes(module, net)


def test_compiled_with_autograd():
    net = Net()
    module = torch.compile(
        ManifoldMixup(net, ["a", "b", "c"], mode="sample", generator=3), backend="aot_eager", fullgraph=True
    )
    check_mixes(module, net, calls=10, grads=True)


# Computed again in backward


def reentrant(part, x):
    return checkpoint(part, x, use_reentrant=True)


def saved_again(part, x):
    return checkpoint(part, x, use_reentrant=False)


@pytest.mark.parametrize("run", [reentrant, saved_again])
@pytest.mark.parametrize("whole", [False, True])
def test_checkpoints_mix_again_as_before(run, whole):
    net = Net(run, whole)
    module = ManifoldMixup(net, ["a", "b", "c"], mode="sample", generator=3)

    def call(x, target):
        return module(x.requires_grad_(), target)

    check_mixes(call, net, grads=True)


@pytest.mark.parametrize("run", [reentrant, saved_again])
def test_checkpoints_of_several_calls_and_plain_ones_in_one_backward(run):
    """Each is computed again with its own draw, and what was not mixed without."""
    net = Net(run, whole=True)
    module = ManifoldMixup(net, ["b"], mix_input=False, mode="sample", generator=3)
    x = [torch.randn(6, 6, requires_grad=True) for _ in range(4)]
    target = torch.arange(6)
    first = module(x[0], target)
    plain = [net(x[1])]
    second = module(x[2], target)
    plain.append(net(x[3]))
    total = first[0].square().sum() + second[0].square().sum() + sum(out.pow(3).sum() for out in plain)
    total.backward(retain_graph=True)
    once = [p.grad.clone() for p in net.parameters()]
    total.backward()
    found = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    again = sum(
        by_definition(net, "b", each, *draw[1:]).square().sum()
        for each, (_, draw) in ((x[0], first), (x[2], second))
    )
    again = again + sum(by_definition(net, None, each, target, target).pow(3).sum() for each in (x[1], x[3]))
    again.backward()
    for ours, both, p in zip(once, found, net.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both, 2 * p.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("inner", [reentrant, saved_again])
@pytest.mark.parametrize("outer", [reentrant, saved_again])
def test_checkpoints_in_checkpoints(inner, outer):
    class Nested(Net):
        def body(self, x):
            return torch.tanh(inner(self.b, torch.tanh(inner(self.a, x))))

    net = Nested(outer, whole=True)
    module = ManifoldMixup(net, ["a", "b", "c"], mode="sample", generator=3)

    def call(x, target):
        module(torch.randn(4, 6, requires_grad=True))  # its graph is gone
        return module(x.requires_grad_(), target)

    check_mixes(call, net, grads=True)


def test_a_repeated_layer_in_a_checkpoint_is_refused_at_backward():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return reentrant(self.layer, reentrant(self.layer, x))

    module = ManifoldMixup(Twice(), ["layer"], mix_input=False, generator=0)
    output = module(torch.randn(6, 3, requires_grad=True))
    with pytest.raises(RuntimeError, match="layer 'layer' must run once in a call to be computed again"):
        output.sum().backward()


def test_a_layer_compiled_in_a_reentrant_checkpoint_is_refused():
    net = Net(reentrant)
    net.b.compile(backend="eager")
    module = ManifoldMixup(net, ["b"], mix_input=False, generator=0)
    with pytest.raises(RuntimeError, match="must not be compiled inside of a reentrant checkpoint"):
        module(torch.randn(6, 6, requires_grad=True))
    net.run = lambda part, x: torch.compile(lambda x: saved_again(part, x), backend="aot_eager")(x)
    del net.b._compiled_call_impl
    net.b._compiled_call_impl = None
    check = ManifoldMixup(net, ["a", "b", "c"], mode="sample", generator=3)
    check_mixes(check, net, grads=True)


def test_what_a_call_left_goes_with_its_graph():
    net = Net(reentrant)
    module = ManifoldMixup(net, ["b"], mix_input=False, generator=0)
    output = module(torch.randn(6, 6, requires_grad=True))
    module(torch.randn(6, 6))
    first, latest = (weakref.ref(reference()) for reference in net.b._calls)
    gc.disable()
    try:
        assert first() is not None
        del output
        assert first() is None and latest() is module._latest
    finally:
        gc.enable()
