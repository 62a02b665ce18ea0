"""`nn.Mixup`: draws, images, targets and masks."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import ssl_kernels
from ssl_kernels.nn import Mixup
from ssl_kernels.recipes.memory import peak_memory
from tests.helpers import BACKENDS, same_bits

MODES = ("batch", "pair", "sample")


def batch_of(batch=8, height=10, width=12):
    """Images whose pixels tell their sample, and classes."""
    images = torch.arange(float(batch)).view(-1, 1, 1, 1).expand(batch, 2, height, width).contiguous()
    return images, torch.arange(batch) % 5


def expected_images(x, draw):
    """Of the drawn numbers, sample by sample."""
    mixed = []
    for i, partner in enumerate(draw.permutation.tolist()):
        share = draw.pixel_lam[i].double()
        sample = share * x[i].double() + (1 - share) * x[partner].double()
        if draw.boxes is not None:
            y0, y1, x0, x1 = draw.boxes[i].tolist()
            sample[..., y0:y1, x0:x1] = x[partner, ..., y0:y1, x0:x1].double()
        mixed.append(sample)
    return torch.stack(mixed)


def settings():
    for mode in MODES:
        for pairing in ("random", "flip", "roll"):
            if (mode, pairing) != ("pair", "roll"):
                for alphas in ((1.0, 0.0), (0.0, 1.0), (0.4, 0.7)):
                    yield mode, pairing, alphas


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode, pairing, alphas", list(settings()))
@pytest.mark.parametrize("inplace", [True, False])
def test_images_and_targets_are_those_of_the_draw(backend, mode, pairing, alphas, inplace):
    for seed in range(4):
        options = {"mode": mode, "pairing": pairing, "prob": 0.8, "inplace": inplace, "backend": backend}
        module = Mixup(*alphas, num_classes=5, generator=torch.Generator().manual_seed(seed), **options)
        for batch in (1, 7, 8):
            x, target = batch_of(batch)
            before = x.clone()
            state = module.generator.get_state()
            draw = module.draw(x)
            module.generator.set_state(state)
            mixed, dense = module(x, target)
            assert (mixed is x) == inplace
            assert inplace or same_bits(x, before)
            torch.testing.assert_close(mixed.double(), expected_images(before, draw), rtol=1e-6, atol=1e-6)
            one_hot = F.one_hot(target, 5).float()
            share = draw.lam[:, None]
            torch.testing.assert_close(dense, share * one_hot + (1 - share) * one_hot[draw.permutation])


@pytest.mark.parametrize("mode, pairing, alphas", list(settings()))
def test_lam_is_the_share_of_pixels(mode, pairing, alphas):
    """Of every sample, also where CutMix boxes are cut off at the border."""
    module = Mixup(*alphas, mode=mode, pairing=pairing, generator=3, inplace=False)
    for _ in range(5):
        x, _ = batch_of(9)
        draw = module.draw(x)
        mixed = module.mix(x, draw)
        here = torch.arange(9)
        moved = draw.permutation != here
        share = (mixed.double().mean((1, 2, 3)) - draw.permutation) / (here - draw.permutation)
        torch.testing.assert_close(share[moved], draw.lam[moved].double(), rtol=1e-5, atol=1e-5)
        assert sorted(draw.permutation.tolist()) == list(range(9))


def test_modes():
    """A batch shares one draw, a pair one, a sample has its own; a pair are each other's partners."""
    x, _ = batch_of(9)
    for mode, least, most in (("batch", 1, 1), ("pair", 4, 5), ("sample", 8, 9), ("elem", 8, 9)):
        draw = Mixup(1.0, mode=mode, generator=0).draw(x)
        assert least <= len(draw.lam.unique()) <= most, mode
    draw = Mixup(1.0, 1.0, mode="pair", generator=0).draw(x)
    assert torch.equal(draw.permutation[draw.permutation], torch.arange(9))
    assert torch.equal(draw.lam, draw.lam[draw.permutation])
    assert torch.equal(draw.boxes, draw.boxes[draw.permutation])


def test_pairings():
    x, _ = batch_of(5)
    assert Mixup(pairing="flip").draw(x).permutation.tolist() == [4, 3, 2, 1, 0]
    assert Mixup(pairing="roll").draw(x).permutation.tolist() == [4, 0, 1, 2, 3]
    drawn = {tuple(Mixup(generator=seed).draw(x).permutation.tolist()) for seed in range(50)}
    assert len(drawn) > 20


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_lam_is_beta_distributed(alpha):
    """Mean and variance of Beta(alpha, alpha), and for alpha 1 uniform."""
    lam = Mixup(alpha, mode="sample", generator=1).draw(torch.zeros(20000, 1)).lam.double()
    deviation = math.sqrt(1 / (4 * (2 * alpha + 1)))
    assert lam.mean().item() == pytest.approx(0.5, abs=5 * deviation / math.sqrt(20000))
    assert lam.std().item() == pytest.approx(deviation, rel=0.02)
    if alpha == 1:
        found = torch.histc(lam, 10, 0, 1) / 20000
        assert (found - 0.1).abs().max() < 0.012


def test_tiny_alpha_gives_no_nan():
    lam = Mixup(1e-3, mode="sample", generator=1).draw(torch.zeros(20000, 1)).lam
    assert ((lam >= 0) & (lam <= 1)).all()


def test_probabilities():
    x = torch.zeros(4000, 1, 16, 16)
    draw = Mixup(1.0, 1.0, prob=0.6, switch_prob=0.25, mode="sample", generator=2).draw(x)
    pasted = (draw.pixel_lam == 1) & (draw.lam < 1)
    blended = draw.pixel_lam < 1
    assert pasted.float().mean().item() == pytest.approx(0.15, abs=0.03)
    assert blended.float().mean().item() == pytest.approx(0.45, abs=0.03)
    assert (draw.boxes[blended] == 0).all()
    untouched = Mixup(1.0, 1.0, prob=0.0).draw(x)
    assert (untouched.lam == 1).all() and (untouched.pixel_lam == 1).all() and (untouched.boxes == 0).all()


def test_cutmix_area_and_its_correction():
    x = torch.zeros(4000, 1, 64, 64)
    corrected = Mixup(0, 1.0, mode="sample", generator=5).draw(x)
    drawn = Mixup(0, 1.0, mode="sample", generator=5, correct_lam=False).draw(x)
    assert torch.equal(corrected.boxes, drawn.boxes)
    assert (corrected.lam >= drawn.lam - 1e-6).all()  # the border only takes area away
    inside = ((corrected.boxes[:, 0] > 0) & (corrected.boxes[:, 1] < 64)) & (
        (corrected.boxes[:, 2] > 0) & (corrected.boxes[:, 3] < 64)
    )
    assert (corrected.lam - drawn.lam)[inside].max() < 0.07  # whole pixels


def test_cutmix_minmax():
    draw = Mixup(0, 1.0, cutmix_minmax=(0.2, 0.5), mode="sample", generator=5).draw(
        torch.zeros(500, 1, 40, 60)
    )
    y0, y1, x0, x1 = draw.boxes.unbind(1)
    assert y0.min() >= 0 and y1.max() <= 40 and x1.max() <= 60
    assert 8 <= (y1 - y0).min() and (y1 - y0).max() <= 20
    assert 12 <= (x1 - x0).min() and (x1 - x0).max() <= 30
    torch.testing.assert_close(draw.lam, 1 - ((y1 - y0) * (x1 - x0)).float() / 2400)


def test_same_seed_same_draws():
    x, target = batch_of(16)
    runs = []
    for backend in BACKENDS:
        torch.manual_seed(len(runs))  # which must not matter
        module = Mixup(0.5, 0.5, mode="sample", generator=11, inplace=False, num_classes=5, backend=backend)
        runs.append([*module(x, target), *module(x, target)])
    for run in runs[1:]:
        for found, expected in zip(run, runs[0], strict=True):
            torch.testing.assert_close(found, expected)
    assert not torch.equal(runs[0][0], runs[0][2])


class NoHostReads(TorchDispatchMode):
    """Fails at operations that would wait for a GPU: those that turn values into Python numbers or shapes."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in ("_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("num_classes", [None, 5])
def test_nothing_is_read_on_the_host(mode, num_classes):
    x, target = batch_of()
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoHostReads():
        x.sum().item()
    module = Mixup(0.5, 0.5, mode=mode, generator=1, num_classes=num_classes, prob=0.5, backend="native")
    with NoHostReads():
        module(x, target, x.clone())


def test_own_generator_leaves_the_global_one():
    x, _ = batch_of()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    Mixup(1.0, 1.0, generator=3)(x)
    assert torch.equal(torch.rand(1), expected)
    torch.manual_seed(0)
    Mixup(1.0, 1.0)(x)
    assert not torch.equal(torch.rand(1), expected)


def test_targets_without_a_dense_one_feed_the_loss():
    x, target = batch_of()
    logits = torch.randn(8, 5)
    module = Mixup(1.0, mode="sample", generator=4)
    _, mixed = module(x.clone(), target)
    dense = Mixup(1.0, mode="sample", generator=4, num_classes=5)(x.clone(), target)[1]
    torch.testing.assert_close(
        ssl_kernels.mixup_cross_entropy(logits, *mixed), F.cross_entropy(logits, dense)
    )


def test_draws_feed_imix_loss():
    """The loss takes what the images were mixed with: against soft targets on the logits of every key."""
    x, target = batch_of()
    query, key = torch.randn(2, 8, 6)
    for mode in MODES:
        module = Mixup(1.0, 1.0, mode=mode, generator=4)
        draw = module.draw(x)
        module.mix(x.clone(), draw)
        _, permutation, lam = module.mix_target(target, draw)
        found = ssl_kernels.imix_loss(query, key, permutation, lam, temperature=0.5)
        logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / 0.5
        own = torch.eye(8)
        share = draw.lam[:, None]
        expected = F.cross_entropy(logits, share * own + (1 - share) * own[draw.permutation])
        torch.testing.assert_close(found, expected)


def test_timm_users_find_their_arguments():
    """In its order, and with its pairing the numbers of its formulas."""
    timm = (
        "mixup_alpha cutmix_alpha cutmix_minmax prob switch_prob mode correct_lam label_smoothing num_classes"
    )
    assert list(inspect.signature(Mixup).parameters)[:9] == timm.split()
    x, target = batch_of()
    module = Mixup(0.8, 0.0, None, 1.0, 0.5, "batch", True, 0.1, 5, pairing="flip", generator=0)
    lam = module.draw(x).lam[0]
    module.generator.manual_seed(0)
    smoothed = torch.full((8, 5), 0.1 / 5).scatter_(1, target[:, None], 0.9 + 0.1 / 5)
    expected = x * lam + x.flip(0) * (1 - lam), smoothed * lam + smoothed.flip(0) * (1 - lam)
    for found, wanted in zip(module(x, target), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_torchvision_users_find_their_arguments():
    """`MixUp(alpha, num_classes)` by the same λ."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    x, target = batch_of()
    module = Mixup(0.7, num_classes=5, pairing="roll", generator=1, inplace=False)
    draw = module.draw(x)
    transform = v2.MixUp(alpha=0.7, num_classes=5)
    transform.make_params = lambda _inputs: {"lam": draw.lam[0].item()}
    found = module.mix(x, draw), module.mix_target(target, draw)
    for ours, theirs in zip(found, transform(x, target), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torchvision_users_find_cutmix():
    """`CutMix(alpha, num_classes)` by the same box and the area that it leaves."""
    v2 = pytest.importorskip("torchvision.transforms.v2")
    x, target = batch_of()
    module = Mixup(0, 0.7, num_classes=5, pairing="roll", generator=1, inplace=False)
    draw = module.draw(x)
    y0, y1, x0, x1 = draw.boxes[0].tolist()
    transform = v2.CutMix(alpha=0.7, num_classes=5)
    transform.make_params = lambda _inputs: {"box": (x0, y0, x1, y1), "lam_adjusted": draw.lam[0].item()}
    found = module.mix(x, draw), module.mix_target(target, draw)
    for ours, theirs in zip(found, transform(x, target), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_label_smoothing_is_that_of_cross_entropy():
    x, target = batch_of()
    logits = torch.randn(8, 5)
    smoothed = Mixup(1.0, generator=4, num_classes=5, label_smoothing=0.1)(x.clone(), target)[1]
    plain = Mixup(1.0, generator=4, num_classes=5)(x.clone(), target)[1]
    expected = F.cross_entropy(logits, plain, label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, smoothed), expected)


def test_dense_targets_in():
    x, _ = batch_of()
    probabilities = torch.randn(8, 5).softmax(1)
    module = Mixup(1.0, generator=4, inplace=False)
    draw = module.draw(x)
    expected = draw.lam[:, None] * probabilities + (1 - draw.lam)[:, None] * probabilities[draw.permutation]
    torch.testing.assert_close(module.mix_target(probabilities, draw), expected)


def test_masks_follow_the_images():
    x, _ = batch_of()
    classes = x[:, 0].long()
    mixed, mixed_classes = Mixup(0, 1.0, mode="sample", generator=1)(x, masks=classes)
    assert torch.equal(mixed[:, 0].long(), mixed_classes)
    x, target = batch_of()
    mixed, _, mixed_masks = Mixup(1.0, 1.0, mode="sample", generator=1)(x, target, x[:, :1].clone())
    assert torch.equal(mixed[:, :1], mixed_masks)


@pytest.mark.parametrize("mode", MODES)
def test_in_place_takes_a_part_of_the_batch_beside_it(mode):
    """Also where every sample is blended or pasted into by itself."""
    x, masks = torch.randn(64, 3, 64, 64), torch.randn(64, 64, 64)
    module = Mixup(1.0, 1.0, mode=mode, generator=1)

    def step():
        module(x, masks=masks)

    assert peak_memory(step, x.device) < 0.3 * x.nbytes


@pytest.mark.parametrize("height", [1, 15, 16, 17, 35])
def test_bands_of_any_height(height):
    x = torch.randn(9, 2, height, 7).to(memory_format=torch.channels_last)
    before = x.clone()
    module = Mixup(1.0, 1.0, mode="sample", generator=6)
    draw = module.draw(x)
    assert module.mix(x, draw) is x
    torch.testing.assert_close(x.double(), expected_images(before, draw), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_8_bit_images_come_out_normalized(mode):
    x = torch.randint(256, (6, 3, 9, 8), dtype=torch.uint8)
    options = {"mode": mode, "inplace": False}
    module = Mixup(0.5, 0.5, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4], generator=7, **options)
    for _ in range(4):
        draw = module.draw(x)
        plain = (x.double() / 255 - module.mean.double().view(3, 1, 1)) / module.std.double().view(3, 1, 1)
        torch.testing.assert_close(
            module.mix(x, draw).double(), expected_images(plain, draw), rtol=1e-5, atol=1e-5
        )


def test_evaluation_mixes_nothing():
    x, target = batch_of()
    before = x.clone()
    module = Mixup(1.0, 1.0, num_classes=5, generator=1, label_smoothing=0.1).eval()
    mixed, dense = module(x, target)
    assert mixed is x and same_bits(mixed, before)
    assert torch.equal(dense, F.one_hot(target, 5).float())  # a target to judge by is not smoothed
    shares = torch.rand(8, 5)
    assert torch.equal(module(x, shares)[1], shares)
    assert torch.equal(Mixup(generator=1).eval()(x, target)[1][2], torch.ones(8))
    state = module.state_dict()["_extra_state"]
    assert torch.equal(state, Mixup(1.0, generator=1).state_dict()["_extra_state"])  # nothing was drawn


with torch.inference_mode():
    INFERENCE = torch.rand(4, 3, 5, 5)
UNMIXED = {  # what mixing cannot take, in training
    "bytes": torch.zeros(4, 3, 5, 5, dtype=torch.uint8),
    "with a gradient": torch.rand(4, 3, 5, 5, requires_grad=True),
    "two dimensions": torch.rand(4, 7),
    "one element for all": torch.rand(1).expand(4, 3, 5, 5),
    "inference": INFERENCE,
    "sparse": torch.rand(4, 3).to_sparse(),
    "empty": torch.rand(0, 3, 5, 5),
}


@pytest.mark.parametrize("name", UNMIXED)
@pytest.mark.parametrize("inplace", [True, False])
def test_evaluation_refuses_nothing_that_mixing_alone_would(name, inplace):
    x = UNMIXED[name]
    module = Mixup(1.0, 1.0, inplace=inplace, num_classes=5, backend="triton").eval()
    target = torch.arange(len(x)) % 5
    assert module(x) is x
    found, dense = module(x, target)
    assert found is x and torch.equal(dense, F.one_hot(target, 5).float())
    masks = module(x, masks=x)[1]
    assert (masks.target if x.dtype == torch.uint8 else masks) is x
    with pytest.raises(ValueError, match="target must"):
        module(x, torch.zeros(9, dtype=torch.int64))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cutmix_alpha", [0.0, 1.0])
def test_evaluation_normalizes(backend, cutmix_alpha):
    x = torch.randint(256, (4, 3, 5, 5), dtype=torch.uint8)
    module = Mixup(1.0, cutmix_alpha, mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4], backend=backend).eval()
    expected = (x / 255 - module.mean.view(3, 1, 1)) / module.std.view(3, 1, 1)
    torch.testing.assert_close(module(x), expected)
    with pytest.raises(TypeError, match=r"^Mixup: x must be uint8"):
        module(expected)
