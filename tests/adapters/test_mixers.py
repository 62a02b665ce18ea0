"""What the mixers' adapters do beside mixing as the originals do."""

import numpy as np
import pytest
import torch

from ssl_kernels.adapters import kornia, timm, torchvision


def test_kornias_lambda_is_the_partners_share():
    x, partners, lam = torch.rand(4, 3, 5, 6), torch.tensor([2, 0, 1, 3]), torch.tensor([0.0, 1.0, 0.25, 0.5])
    share = lam.view(-1, 1, 1, 1)
    torch.testing.assert_close(kornia.blend(x, partners, lam), x * (1 - share) + x[partners] * share)


def test_kornias_corners_lie_in_the_box():
    x, partners = torch.rand(2, 3, 5, 6), torch.tensor([1, 0])
    corners = torch.tensor([[[1, 2], [3, 2], [3, 4], [1, 4]], [[0, 0], [-1, 0], [-1, -1], [0, -1]]]).float()
    out = kornia.paste(x, partners, corners)
    expected = x.clone()
    expected[0, :, 2:5, 1:4] = x[1, :, 2:5, 1:4]
    assert torch.equal(out, expected)  # the second box is empty


def test_torchvisions_partner_is_the_sample_before():
    x = torch.rand(4, 3, 5, 6)
    torch.testing.assert_close(torchvision.blend(x, 0.3), 0.3 * x + 0.7 * x.roll(1, 0))
    expected = x.clone()
    expected[..., 1:3, 2:5] = x.roll(1, 0)[..., 1:3, 2:5]
    assert torch.equal(torchvision.paste(x, (2, 1, 5, 3)), expected)


def test_torchvision_takes_an_integer_alpha():
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    images, labels = torchvision.MixUp(alpha=1, num_classes=3)(torch.rand(4, 3, 5, 6), torch.arange(4) % 3)
    assert images.shape == (4, 3, 5, 6) and labels.sum(1).tolist() == pytest.approx([1] * 4)


def test_torchvisions_own_messages():
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    mix = torchvision.CutMix(num_classes=3)
    with pytest.raises(ValueError, match="batch size"):
        mix(torch.rand(5, 3, 5, 6), torch.arange(4) % 3)
    with pytest.raises(ValueError, match="4 dims"):
        mix(torch.rand(4, 5, 6), torch.arange(4) % 3)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_timm_mixes_in_place_and_odd_batches(mode):
    np.random.seed(0)
    x = torch.rand(5, 3, 6, 5)
    before = x.clone()
    mixed, target = timm.Mixup(cutmix_alpha=1.0, mode=mode, num_classes=4)(x, torch.arange(5) % 4)
    assert mixed is x and not torch.equal(x, before)
    torch.testing.assert_close(x[2], before[2])
    torch.testing.assert_close(target.sum(1), torch.ones(5))
    with pytest.raises(AssertionError, match="even number of samples, got 5"):
        timm.Mixup(mode=mode, strict=True)(x, torch.arange(5))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("seed", range(4))
def test_timm_mixes_features_in_the_middle_of_a_graph(mode, seed):
    """In place, and their gradient goes back to the samples that a mixed one is of."""
    leaf = torch.rand(6, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, 2, 5, 4, dtype=torch.float64)
    mix = timm.Mixup(cutmix_alpha=1.0, mode=mode, num_classes=4)

    def mixed(x):
        np.random.seed(seed)
        return mix(x, torch.arange(6) % 4)[0]

    features = leaf * 1
    assert mixed(features) is features
    (gradient,) = torch.autograd.grad((features * weight).sum(), leaf)
    torch.testing.assert_close(features.detach(), mixed(leaf.detach().clone()))
    # The mixing is linear, and its transpose is what the gradient is of.
    direction = torch.rand(6, 2, 5, 4, dtype=torch.float64)
    torch.testing.assert_close((gradient * direction).sum(), (weight * mixed(direction.clone())).sum())
    with pytest.raises(RuntimeError, match="leaf"):
        mixed(leaf)


def test_timm_keeps_lambda_for_uint8_images():
    np.random.seed(0)
    x = torch.randint(256, (6, 3, 8, 8), dtype=torch.uint8)
    before = x.clone()
    mix = timm.Mixup(mixup_alpha=0.0, cutmix_alpha=1.0, mode="elem", num_classes=6, label_smoothing=0.0)
    x, target = mix(x, torch.arange(6))
    own = (x == before)[:, 0].double().mean((1, 2))  # nearly all pixels differ
    torch.testing.assert_close(target.diagonal().double(), own, rtol=0, atol=0.05)
    with pytest.raises(TypeError, match="floating"):
        timm.Mixup(mode="elem")(x, torch.arange(6))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (4, 0, 5, 5)])
def test_timm_mixes_nothing(mode, shape):
    for options in ({}, {"mixup_alpha": 0.0, "cutmix_alpha": 1.0}):
        mix = timm.Mixup(mode=mode, num_classes=4, **options)
        x, target = mix(torch.rand(shape), torch.arange(shape[0]))
        assert x.shape == shape and target.shape == (shape[0], 4)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (1, 4)])
def test_timm_takes_one_class_a_sample(shape):
    np.random.seed(0)
    _, target = timm.Mixup(prob=0.0, num_classes=4, label_smoothing=0.0)(
        torch.rand(4, 3, 5, 5), torch.arange(4).view(shape)
    )
    assert torch.equal(target, torch.eye(4))


def test_timm_refuses_dense_targets_without_multi_label():
    with pytest.raises(ValueError, match="one class per sample"):
        timm.Mixup(num_classes=3)(torch.rand(4, 3, 5, 5), torch.rand(4, 3))
    _, target = timm.Mixup(num_classes=3, multi_label=True)(torch.rand(4, 3, 5, 5), torch.ones(4, 3))
    torch.testing.assert_close(target, torch.full((4, 3), 0.95))
    with pytest.raises(ValueError, match=r"shape \(B, 3\)"):
        timm.Mixup(num_classes=3, multi_label=True)(torch.rand(4, 3, 5, 5), torch.ones(4))


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_timms_boxes_between_two_shares_of_a_side(mode):
    """Pasted from the partner at the other end; the target's share is that of the pixels that are left."""
    mix = timm.Mixup(
        mixup_alpha=0.0, cutmix_minmax=(0.25, 0.75), mode=mode, num_classes=8, label_smoothing=0.0
    )
    sides = set()
    for seed in range(12):
        np.random.seed(seed)
        x = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 16, 8).clone()
        mixed, target = mix(x, torch.arange(8))
        for i in range(8):
            inside = mixed[i, 0] != i
            assert (mixed[i, 0][inside] == 7 - i).all()
            rows, columns = inside.any(1).sum().item(), inside.any(0).sum().item()
            assert inside.sum() == rows * columns
            sides.add((rows, columns))
            torch.testing.assert_close(target[i, i].item(), 1 - rows * columns / 128)
            torch.testing.assert_close(target[i, 7 - i].item(), rows * columns / 128)
    assert {rows for rows, _ in sides} <= set(range(4, 12)) and {columns for _, columns in sides} <= {
        2,
        3,
        4,
        5,
    }
    assert len(sides) > 5


@pytest.mark.parametrize("switch_prob", [0.0, 1.0])
def test_timm_switches_to_cutmix(switch_prob):
    """And without correct_lam λ is what was drawn, not the share that the image's edge leaves."""
    options = {"cutmix_alpha": 1.0, "switch_prob": switch_prob, "num_classes": 4, "label_smoothing": 0.0}
    for seed in range(5):
        np.random.seed(seed)
        x = torch.rand(4, 3, 9, 9)
        mixed, target = timm.Mixup(correct_lam=False, **options)(x.clone(), torch.arange(4))
        pasted = ((mixed == x) | (mixed == x.flip(0))).all()
        assert pasted == (switch_prob == 1.0)
        np.random.seed(seed)
        np.random.rand(2)
        assert target[0, 0].item() == pytest.approx(np.random.beta(1.0, 1.0))


def test_timm_switched_off():
    mix = timm.Mixup(num_classes=3, label_smoothing=0.3)
    mix.mixup_enabled = False
    x = torch.rand(4, 3, 5, 5)
    before = x.clone()
    out, target = mix(x, torch.tensor([0, 1, 2, 0]))
    assert torch.equal(out, before)
    torch.testing.assert_close(target[0], torch.tensor([0.8, 0.1, 0.1]))
    with pytest.raises(AssertionError, match="alpha"):
        timm.Mixup(mixup_alpha=0.0)(x, torch.tensor([0, 1, 2, 0]))
