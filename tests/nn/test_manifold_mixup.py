"""`nn.ManifoldMixup`: hidden features mixed inside a model."""

import pytest
import torch
import torch.nn.functional as F

from ssl_kernels.nn import ManifoldMixup


def two_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 5))


def test_manifold_mixup_mixes_one_layer():
    model = two_layers()
    x, target = torch.randn(8, 6), torch.arange(8) % 5
    module = ManifoldMixup(model, ["0", "1"], mode="sample", num_classes=5, generator=3)
    layers_seen = set()
    for _ in range(12):
        state = module.mixup.generator.get_state() if module.mixup.generator != 3 else None
        output, dense = module(x, target)
        if state is None:
            continue
        module.mixup.generator.set_state(state)
        draw = module.mixup.draw(x)
        share = draw.lam[:, None]

        def mixed(values, share=share, draw=draw):
            return share * values + (1 - share) * values[draw.permutation]

        first = model[0](x)
        expected = {
            "input": model(mixed(x)),
            "0": model[2](model[1](mixed(first))),
            "1": model[2](mixed(model[1](first))),
        }
        matching = [name for name, value in expected.items() if torch.allclose(output, value, atol=1e-5)]
        assert "input" in matching or len(matching) == 1  # the first layer is linear: input or "0" look alike
        layers_seen.add(matching[-1])
        torch.testing.assert_close(dense, mixed(F.one_hot(target, 5).float()))
    assert layers_seen == {"0", "1"}


def test_manifold_mixup_is_differentiable_and_off_in_evaluation():
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


def test_manifold_mixup_mixes_a_repeated_layer_once():
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Identity()

        def forward(self, x):
            return self.layer(self.layer(x))

    x = torch.randn(6, 3)
    module = ManifoldMixup(Twice(), ["layer"], mix_input=False, generator=0, mode="sample")
    output, (_, permutation, lam) = module(x, torch.arange(6))
    torch.testing.assert_close(output, lam[:, None] * x + (1 - lam)[:, None] * x[permutation])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"layers": ["nowhere"]}, ValueError, r"layers must be submodules of module, got \['nowhere'\]"),
        ({"layers": [], "mix_input": False}, ValueError, "layers must not be empty without mix_input"),
        ({"layers": ["0"], "cutmix_alpha": 1.0}, TypeError, "options must be of"),
    ],
)
def test_manifold_mixup_refuses(arguments, error, message):
    with pytest.raises(error, match=f"^ManifoldMixup: {message}"):
        ManifoldMixup(two_layers(), **arguments)
