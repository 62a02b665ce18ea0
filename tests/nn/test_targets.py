"""Targets and masks in `nn.Mixup`: of every kind, dtype and shape."""

import pytest
import torch
import torch.nn.functional as F

import ssl_kernels
from ssl_kernels.nn import MixedMasks, Mixup
from tests.helpers import same_bits

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MODES = ("batch", "pair", "sample")


def mixed_values(values, draw):
    share = draw.lam.double().view(-1, *[1] * (values.dim() - 1))
    return share * values.double() + (1 - share) * values[draw.permutation].double()


def module_and_draw(x, **options):
    module = Mixup(1.0, mode="sample", inplace=False, generator=torch.Generator().manual_seed(3), **options)
    state = module.generator.get_state()
    draw = module.draw(x)
    module.generator.set_state(state)
    return module, draw


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_classes_of_any_integer_dtype(dtype):
    x, target = torch.randn(8, 3), torch.arange(8) % 5
    module, draw = module_and_draw(x)
    _, mixed = module(x, target.to(dtype))
    assert mixed[0].dtype == torch.int64 and torch.equal(mixed[0], target)
    module, draw = module_and_draw(x, num_classes=5)
    _, dense = module(x, target.to(dtype))
    torch.testing.assert_close(dense.double(), mixed_values(F.one_hot(target, 5), draw))
    with pytest.raises(ValueError, match=r"^Mixup: target must be in \[0, 5\), got 5"):
        module(x, torch.full((8,), 5, dtype=dtype))


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool, torch.float32], ids=str)
def test_multi_hot_targets_feed_binary_cross_entropy(dtype):
    x, hot = torch.randn(8, 3), (torch.rand(8, 6) < 0.4).to(dtype)
    for options in ({}, {"num_classes": 6}, {"dense_target": False}, {"target_kind": "values"}):
        module, draw = module_and_draw(x, **options)
        _, mixed = module(x, hot)
        assert mixed.dtype == torch.float32
        torch.testing.assert_close(mixed.double(), mixed_values(hot, draw))
        F.binary_cross_entropy_with_logits(torch.randn(8, 6), mixed)


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool], ids=str)
def test_binary_targets(dtype):
    """Bools are never classes; integers of shape (B,) are, unless it is said otherwise."""
    x, binary = torch.randn(8, 3), (torch.arange(8) % 3 == 0).to(dtype)
    module, draw = module_and_draw(x, target_kind=None if dtype == torch.bool else "values")
    _, mixed = module(x, binary)
    assert mixed.dtype == torch.float32 and mixed.shape == (8,)
    torch.testing.assert_close(mixed.double(), mixed_values(binary, draw))
    if dtype != torch.bool:
        module, _ = module_and_draw(x)
        assert torch.equal(module(x, binary)[1][0], binary.long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8,), (8, 1), (8, 4), (8, 5, 6), (8, 2, 3, 4, 5)])
def test_regression_targets_of_any_shape(dtype, shape):
    x, values = torch.randn(8, 3), torch.randn(shape).to(dtype)
    before = values.clone()
    module, draw = module_and_draw(x)
    _, mixed = module(x, values)
    assert mixed.dtype == dtype and same_bits(values, before)
    tolerance = {"rtol": torch.finfo(dtype).eps, "atol": 2 * torch.finfo(dtype).eps}
    torch.testing.assert_close(mixed.double(), mixed_values(values, draw), **tolerance)


def test_images_as_their_own_target():
    """The target is mixed before the images are overwritten."""
    x = torch.randn(6, 2, 4, 4)
    mixed, target = Mixup(1.0, mode="sample", generator=1)(x, x)
    assert mixed is x and target is not x and same_bits(mixed, target)


@pytest.mark.parametrize(
    "options, target, error, message",
    [
        (
            {"target_kind": "classes"},
            torch.rand(4),
            TypeError,
            "target must hold classes of an integer dtype",
        ),
        (
            {"target_kind": "classes"},
            torch.rand(4) < 1,
            TypeError,
            "target must hold classes of an integer dtype",
        ),
        ({}, torch.full((4, 3), 2), ValueError, r"target must hold 0s and 1s .* got 2; target_kind"),
        (
            {},
            torch.zeros(4, 3, 3, dtype=int),
            ValueError,
            r"target must have shape .* pass class maps as masks",
        ),
        ({}, torch.tensor(1), ValueError, r"target must have shape \(4,\) or \(4, ...\) with .* got \(\)"),
        ({}, torch.zeros(4, 0), ValueError, r"target must have shape .* got \(4, 0\)"),
        (
            {"target_kind": "classes", "num_classes": 3},
            torch.zeros(4, 2, dtype=int),
            ValueError,
            r"target must have shape \(4,\) to become dense, got \(4, 2\)",
        ),
    ],
)
def test_targets_that_are_refused_before_anything_is_written(options, target, error, message):
    x, masks = torch.rand(4, 2), torch.rand(4, 2)
    before = x.clone(), masks.clone()
    module = Mixup(generator=0, **options)
    with pytest.raises(error, match=f"^Mixup: {message}"):
        module(x, target, masks)
    assert same_bits(x, before[0]) and same_bits(masks, before[1])
    draw = Mixup(generator=0).draw(x)
    with pytest.raises(error, match=f"^Mixup: {message}"):
        module.mix_target(target, draw)


def test_class_maps_if_it_is_said_that_they_are_classes():
    target = torch.randint(5, (4, 3), dtype=torch.int16)
    _, (own, permutation, lam) = Mixup(target_kind="classes", generator=0)(torch.rand(4, 2), target)
    assert torch.equal(own, target.long()) and permutation.shape == lam.shape == (4,)


def test_a_part_of_a_mixed_batch_has_its_loss():
    """As docs/mixing.md shows it, for gradient accumulation."""
    model, images = torch.nn.Linear(6, 5), torch.randn(9, 6)
    images, mixed = Mixup(mode="sample", generator=2)(images, torch.arange(9) % 5)
    whole = ssl_kernels.mixup_cross_entropy(model(images), *mixed)
    target, permutation, lam = mixed
    partner = target[permutation]
    total = 0
    for rows in torch.arange(9).split(4):
        loss = ssl_kernels.mixup_cross_entropy(
            model(images[rows]), target[rows], lam=lam[rows], partner_target=partner[rows], reduction="sum"
        )
        total += loss / len(images)
    torch.testing.assert_close(total, whole)
    found, expected = (torch.autograd.grad(loss, list(model.parameters())) for loss in (total, whole))
    torch.testing.assert_close(found, expected)


def expected_masks(masks, draw):
    """(target, partner) pixel by pixel."""
    target, partner = masks.clone(), masks[draw.permutation]
    if draw.boxes is not None:
        for i, (y0, y1, x0, x1) in enumerate(draw.boxes.tolist()):
            target[i, ..., y0:y1, x0:x1] = partner[i, ..., y0:y1, x0:x1]
    return target, partner


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alphas", [(1.0, 0.0), (0.7, 0.7)])
@pytest.mark.parametrize("dtype", [*INTEGERS, torch.uint16, torch.uint32], ids=str)
def test_integer_masks_beside_blended_images(dtype, alphas, mode, inplace):
    """Every pixel of an image is that of the two masks with their shares."""
    values = torch.randint(100, (6, 1, 5, 7)).to(dtype)
    module = Mixup(*alphas, mode=mode, inplace=inplace, generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        x, masks = values.double(), values.clone()
        state = module.generator.get_state()
        draw = module.draw(x)
        module.generator.set_state(state)
        mixed, found = module(x.clone(), masks=masks)
        assert isinstance(found, MixedMasks) and found.target.dtype == found.partner.dtype == dtype
        target, partner = expected_masks(values, draw)
        assert torch.equal(found.target, target) and torch.equal(found.partner, partner)
        assert (found.target is masks) == inplace and (inplace or torch.equal(masks, values))
        share = found.lam.double().view(-1, 1, 1, 1)
        torch.testing.assert_close(mixed, share * target.double() + (1 - share) * partner.double())


def test_masks_feed_a_loss_of_every_pixel():
    images, masks = torch.rand(4, 3, 8, 8), torch.randint(5, (4, 8, 8))
    masks[:, 0] = 255
    net = torch.nn.Conv2d(3, 5, 1)
    images, mixed = Mixup(0.8, 1.0, generator=4)(images, masks=masks)
    logits = net(images)
    found = ssl_kernels.mixup_cross_entropy(
        logits, mixed.target, lam=mixed.lam, partner_target=mixed.partner, ignore_index=255, reduction="none"
    )
    own, partner = (
        F.cross_entropy(logits, target, ignore_index=255, reduction="none")
        for target in (mixed.target, mixed.partner)
    )
    share = mixed.lam[:, None, None]
    torch.testing.assert_close(found, share * own + (1 - share) * partner)


def test_bool_masks_are_blended_as_numbers():
    masks = torch.rand(6, 5, 7) < 0.5
    module = Mixup(0.7, 0.7, mode="sample", generator=torch.Generator().manual_seed(1))
    before = masks.clone()
    images, found = module(masks.float()[:, None].clone(), masks=masks)
    assert found.dtype == torch.float32 and torch.equal(masks, before)
    torch.testing.assert_close(found, images[:, 0])


@pytest.mark.parametrize("dtype", [*INTEGERS, torch.bool], ids=str)
def test_cutmix_alone_pastes_masks_of_any_dtype_in_place(dtype):
    x, masks = torch.rand(6, 1, 5, 7), torch.randint(2, (6, 5, 7)).to(dtype)
    before, module = masks.clone(), Mixup(0, 1.0, mode="sample", generator=torch.Generator().manual_seed(1))
    state = module.generator.get_state()
    draw = module.draw(x)
    module.generator.set_state(state)
    _, found = module(x, masks=masks)
    assert found is masks and torch.equal(found, expected_masks(before, draw)[0])


def test_masks_in_evaluation():
    masks = torch.randint(9, (4, 5, 7))
    _, found = Mixup(1.0, 1.0).eval()(torch.rand(4, 1, 5, 7), masks=masks)
    assert torch.equal(found.target, masks) and (found.lam == 1).all()


def test_interleaved_masks_are_taken():
    memory = torch.rand(4, 4, 5, 5)
    before = memory.clone()
    module = Mixup(1.0, mode="sample", generator=torch.Generator().manual_seed(1))
    state = module.generator.get_state()
    module(memory[:, :3], masks=memory[:, 3:])
    module.generator.set_state(state)
    torch.testing.assert_close(memory, module(before))


@pytest.mark.filterwarnings("ignore")
def test_targets_and_masks_compile_without_a_graph_break():
    torch._dynamo.reset()
    module = Mixup(1.0, 1.0, inplace=False)
    masks = torch.randint(9, (4, 5, 7))
    for target in (torch.arange(4, dtype=torch.uint8), torch.rand(4, 3) < 0.5, torch.randint(2, (4, 3))):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        x = torch.rand(4, 1, 5, 7)
        results = []
        for run in (module, compiled):
            torch.manual_seed(1)
            results.append(torch.utils._pytree.tree_leaves(run(x, target, masks)))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)
