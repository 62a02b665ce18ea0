"""The networks for the images that they get. What methods make of them is in test_method_losses.py."""

from types import SimpleNamespace

import pytest
import torch

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
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again) and not torch.equal(first, other)
