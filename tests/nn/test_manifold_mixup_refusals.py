"""What `nn.ManifoldMixup` refuses, and what stays as it was."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_kernels.nn import ManifoldMixup
from tests.nn.test_manifold_mixup import Net, check_mixes, no_compiled_code, two_layers  # noqa: F401  a fixture


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
