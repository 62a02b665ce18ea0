"""The networks for the images that they get. What methods make of them is in test_method_losses.py."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ssl_kernels.recipes import engine, experiment
from ssl_kernels.recipes.encoders import PatchTransformer, SmallConvNet, mlp


@pytest.mark.parametrize("size, is_small", [(32, True), (64, True), (65, False)])
def test_resnet_keeps_the_resolution_of_small_images(size, is_small):
    encoder = experiment.build_encoder(SimpleNamespace(channels=3, image_size=size, classes=2), 0, "simclr")
    rows = torch.zeros(1, 3, 32, 32)
    with torch.no_grad():
        stem = encoder.maxpool(encoder.conv1(rows))
    assert stem.shape[2:] == ((32, 32) if is_small else (8, 8))
    assert encoder.out_features == 512 and encoder.fc(rows) is rows


@pytest.mark.parametrize("kind", [SmallConvNet, lambda: PatchTransformer(1, 8)])
def test_features_have_the_width_that_is_told(kind):
    encoder = kind().eval()
    features = encoder(torch.rand(2, 1, 8, 8))
    assert features.shape == (2, encoder.out_features)
    assert (features >= 0).all() == (kind is SmallConvNet)  # which ends in the mean of a rectifier


def with_other_norms(module):
    """Weights and biases of normalisations, which begin as 1 and 0, are drawn."""
    for part in module.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)) and part.affine:
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return module


def normalized(x, norm):
    return F.batch_norm(x, None, None, norm.weight, norm.bias, training=True)


def test_the_usual_head_by_hand():
    torch.manual_seed(0)
    head, rows = with_other_norms(mlp(5, 3, 7)), torch.randn(6, 5)
    first, last = (layer for layer in head if isinstance(layer, nn.Linear))
    assert first.bias is None
    hidden = normalized(F.linear(rows, first.weight), head[1]).relu()
    torch.testing.assert_close(head(rows), F.linear(hidden, last.weight, last.bias))


def test_the_small_network_by_hand():
    torch.manual_seed(0)
    network, images = with_other_norms(SmallConvNet(2, width=4)), torch.rand(3, 2, 8, 8)
    convolutions, norms = (
        [x for x in network if isinstance(x, kind)] for kind in (nn.Conv2d, nn.BatchNorm2d)
    )
    x = images
    for place, (convolution, norm) in enumerate(zip(convolutions, norms, strict=True)):
        x = normalized(F.conv2d(x, convolution.weight, padding=1), norm).relu()
        x = F.max_pool2d(x, 2) if place == 1 else x
    assert len(convolutions) == 3 and x.shape == (3, 16, 4, 4)
    torch.testing.assert_close(network(images), x.mean((2, 3)))


def test_features_of_patches_are_their_mean():
    encoder, images = PatchTransformer(1, 8), torch.rand(3, 1, 8, 8)
    tokens = encoder(images, torch.arange(16).expand(3, -1))
    assert tokens.std(1).min() > 0
    torch.testing.assert_close(encoder(images), tokens.mean(1))
    torch.testing.assert_close(
        encoder(images[:1]), tokens[:1].mean(1)
    )  # which the other images do not change


@pytest.mark.parametrize("name, projector, predictor", [
    ("simclr", 64, None),
    ("mocov3", 64, 24),
    ("barlow", 24, None),
    ("vicreg", 24, None),
    ("simsiam", 64, 6),  # a bottleneck
])  # fmt: skip
def test_hidden_layers_of_heads(name, projector, predictor):
    images = SimpleNamespace(channels=1, image_size=8, classes=2)
    method = experiment.build_method(
        images, engine.Settings(name, "digits", 1, 8, 0.1, options={"width": 24})
    )
    for head, width in (
        (method.online.projection, projector),
        (getattr(method, "predictor", None), predictor),
    ):
        first = None if head is None else next(x for x in head.modules() if isinstance(x, nn.Linear))
        assert (first and first.out_features) == width
    embeddings = with_other_norms(method).online(torch.rand(20, 1, 8, 8))
    is_standard = (
        embeddings.mean(0).abs().max() < 1e-5 and (embeddings.var(0, correction=0) - 1).abs().max() < 0.02
    )
    assert embeddings.shape == (20, 24) and is_standard == (name == "simsiam")


def test_heads_are_as_wide_as_they_are_asked_to_be():
    for hidden in (None, 7):
        layers = [layer for layer in mlp(5, 3, hidden) if isinstance(layer, torch.nn.Linear)]
        assert [(each.in_features, each.out_features) for each in layers] == [
            (5, hidden or 5),
            (hidden or 5, 3),
        ]
    images = SimpleNamespace(channels=1, image_size=8, classes=2)
    settings = engine.Settings("byol", "digits", 1, 8, 0.1, options={"width": 40})
    method = experiment.build_method(images, settings)
    for head in (method.online.projection, method.predictor):  # wider than in- and output
        assert head[0].out_features == 128 > max(head[0].in_features, head[-1].out_features)


@pytest.mark.parametrize("size, side", [(8, 2), (28, 4), (12, 2), (24, 3), (37, 37)])
def test_an_image_is_at_most_64_patches(size, side):
    encoder = PatchTransformer(3, size)
    assert encoder.side == side and encoder.places.shape[0] == (size // side) ** 2 <= 64


@pytest.mark.parametrize("method", ["simclr", "mae"])
def test_an_encoder_is_drawn_from_its_seed_alone(method):
    images = SimpleNamespace(channels=1, image_size=8, classes=2)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (
        torch.cat([each.flatten() for each in experiment.build_encoder(images, seed, method).parameters()])
        for seed in (3, 3, 4)
    )
    begin = experiment.build_method(images, engine.Settings(method, "digits", 1, 8, 0.1, seed=3)).encoder
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.cat([each.flatten() for each in begin.parameters()]), first)  # as it is trained
