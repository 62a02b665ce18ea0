"""`nn.ManifoldMixup`: hidden features mixed inside a model, compiled, computed again in backward or neither."""

import copy
import gc
import pickle
import threading
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


# What is refused, and what stays as it was


class Sometimes(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)


@pytest.mark.parametrize("backend", [None, "eager"])
def test_a_layer_that_does_not_run_is_noticed(backend):
    model = Sometimes()
    model = model if backend is None else torch.compile(model, backend=backend)
    module = ManifoldMixup(model, ["used", "unused"], mix_input=False, generator=0)
    ran = 0
    for _ in range(12):
        try:
            module(torch.randn(4, 3))
            ran += 1
        except ValueError as error:
            assert "layer 'unused' must run in every call of module" in str(error)
    assert 0 < ran < 12


def test_differentiable_and_off_in_evaluation():
    model = two_layers()
    x, target = torch.randn(8, 6, requires_grad=True), torch.arange(8) % 5
    module = ManifoldMixup(model, ["1"], num_classes=5, mix_input=False, generator=3)
    output, dense = module(x, target)
    F.cross_entropy(output, dense).backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is not None for p in model.parameters())
    module.eval()
    output, dense = module(x, target)
    torch.testing.assert_close(output, model(x))
    assert torch.equal(dense, F.one_hot(target, 5).float())
    assert not model[1]._forward_hooks


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Identity()

    def forward(self, x):
        return self.layer(self.layer(x))


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("layers", [["layer"], ["layer", "layer"]])
def test_a_repeated_layer_is_mixed_once(backend, layers):
    x = torch.randn(6, 3)
    module = ManifoldMixup(Twice(), layers, mix_input=False, generator=0, mode="sample")
    call = module if backend is None else torch.compile(module, backend=backend, fullgraph=True)
    output, (_, permutation, lam) = call(x, torch.arange(6))
    torch.testing.assert_close(output, lam[:, None] * x + (1 - lam)[:, None] * x[permutation])


def test_the_model_stays_as_it_was():
    """Its names, classes, copies and pickles, also while its graph lives and after an error inside of it."""
    net = two_layers()
    names, reprs = list(net.state_dict()), repr(net)
    module = ManifoldMixup(net, ["0", "1"], mode="sample", generator=3)
    assert list(module.state_dict()) == [
        "_extra_state",
        *[f"module.{name}" for name in names],
        "mixup._extra_state",
    ]
    x, target = torch.randn(8, 6), torch.arange(8)
    output, _ = module(x, target)
    assert output.grad_fn is not None
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert [type(layer) for layer in twin] == [nn.Linear, nn.Tanh, nn.Linear]
        assert not {"_mixing", "_calls"} & {*vars(twin[0])}
    assert list(net.state_dict()) == names and repr(net) == reprs
    assert isinstance(net[0], nn.Linear) and net[0].__class__ is nn.Linear
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        module(torch.randn(8, 5))
    torch.testing.assert_close(net(x), copy.deepcopy(net)(x))
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        state = copy.deepcopy(module.state_dict())
        expected = [module(x, target) for _ in range(4)]
        module.load_state_dict(state)
        for (output, mixed), (other, other_mixed) in zip(
            expected, (twin(x, target) for _ in range(4)), strict=True
        ):
            assert torch.equal(output, other) and torch.equal(mixed[2], other_mixed[2])


def test_a_layer_that_was_replaced_or_has_a_forward_of_its_own():
    net = Net()
    module = ManifoldMixup(net, ["a", "b", "c"], mode="sample", generator=3)
    net.b = nn.Linear(7, 7)
    check_mixes(module, net)
    forward = net.a.forward
    net.a.forward = lambda x: forward(x)
    check_mixes(module, net)
    other = Net()
    plain = other.a.forward
    other.a.forward = lambda x: plain(x)
    check_mixes(ManifoldMixup(other, ["a", "b", "c"], mode="sample", generator=3), other)


def test_a_layer_whose_class_is_changed():
    """As parametrizations do, and FSDP, before and after."""
    doubled = nn.utils.parametrize.register_parametrization
    for before in (True, False):
        net = Net()
        if before:
            doubled(net.b, "weight", Doubled())
        module = ManifoldMixup(net, ["a", "b", "c"], mode="sample", generator=3)
        if not before:
            doubled(net.b, "weight", Doubled())
        check_mixes(module, net)
        assert torch.equal(net.b.weight, 2 * net.b.parametrizations.weight.original)
        assert torch.equal(copy.deepcopy(net).b.weight, net.b.weight)
        nn.utils.parametrize.remove_parametrizations(net.b, "weight")
        assert net.b.__class__ is nn.Linear
        check_mixes(module, net)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_scripted_layer():
    net = Net()
    net.b = torch.jit.script(net.b)
    check_mixes(ManifoldMixup(net, ["a", "b", "c"], mode="sample", generator=3), net)


def test_two_threads_are_refused():
    inside, done = threading.Event(), threading.Event()

    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x):
            inside.set()
            done.wait(20)
            return self.layer(x)

    module = ManifoldMixup(Waits(), ["layer"], mix_input=False, generator=0)
    x = torch.randn(4, 3)
    outputs = []
    thread = threading.Thread(target=lambda: outputs.append(module(x)))
    thread.start()
    inside.wait(20)
    try:
        with pytest.raises(RuntimeError, match="ManifoldMixup: module must run in one thread at a time"):
            module(x)
    finally:
        done.set()
        thread.join()
    assert len(outputs) == 1 and not torch.equal(outputs[0], x)


@pytest.mark.parametrize(
    "shape, dim, fits",
    [
        ((5, 5, 3), None, False),
        ((5, 5, 3), 0, True),
        ((5, 5, 3), 1, True),
        ((4, 5, 3), 1, True),
        ((4, 5, 3), None, False),
        ((5, 4, 3), None, True),
        ((5, 5, 3, 3), None, True),
        ((5, 5), None, True),
        ((5, 4, 3), 1, False),
        ((5,), 1, False),
    ],
)
def test_which_dimension_counts_samples(shape, dim, fits):
    """Sequence-first features are named; where their length is the batch's, nothing is guessed."""

    class Makes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x):
            return self.layer(features)

    features = torch.randn(shape)
    module = ManifoldMixup(Makes(), ["layer"], mix_input=False, batch_dim=dim, generator=0, mode="sample")
    x, target = torch.zeros(5, 2), torch.arange(5)
    if not fits:
        with pytest.raises(ValueError, match=r"ManifoldMixup: .*batch_dim"):
            module(x, target)
        return
    output, (_, permutation, lam) = module(x, target)
    dim = dim or 0
    share = lam.view([-1 if d == dim else 1 for d in range(len(shape))])
    torch.testing.assert_close(
        output, share * features + (1 - share) * features.index_select(dim, permutation)
    )


def test_sequence_first_inputs():
    lstm = nn.LSTM(3, 4)

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.lstm = nn.Linear(3, 3), lstm

        def forward(self, x):
            return self.lstm(self.inner(x))[0]

    model = Last()
    module = ManifoldMixup(model, [], generator=0, mode="sample", input_batch_dim=1)
    x = torch.randn(7, 5, 3)
    output, (_, permutation, lam) = module(x, torch.arange(5))
    share = lam[None, :, None]
    torch.testing.assert_close(output, model(share * x + (1 - share) * x[:, permutation]))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"layers": ["nowhere"]}, ValueError, r"layers must be submodules of module, got \['nowhere'\]"),
        ({"layers": [""]}, ValueError, "layers must be submodules of module"),
        ({"layers": [], "mix_input": False}, ValueError, "layers must not be empty without mix_input"),
        ({"layers": ["0"], "cutmix_alpha": 1.0}, TypeError, "options must be of"),
        ({"layers": ["0"], "batch_dim": -1}, ValueError, "batch_dim must be an integer >= 0 or None, got -1"),
        (
            {"layers": ["0"], "input_batch_dim": True},
            ValueError,
            "input_batch_dim must be an integer >= 0 or None, got True",
        ),
    ],
)
def test_manifold_mixup_refuses(arguments, error, message):
    with pytest.raises(error, match=f"^ManifoldMixup: {message}"):
        ManifoldMixup(two_layers(), **arguments)


def test_outputs_that_are_no_features_are_refused():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    with pytest.raises(TypeError, match="the output of '0' must be a floating tensor, got tuple"):
        ManifoldMixup(nn.Sequential(Pair()), ["0"], mix_input=False)(torch.randn(4, 3))
