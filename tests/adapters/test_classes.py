"""Adapters of losses by classes: SupContrast's SupConLoss and infonce's SupervisedInfoNCE."""

import pytest
import torch
from torch import nn

import ssl_kernels
from ssl_kernels import adapters
from tests.adapters.formulas.sup_contrast import SupConLoss


def rows(n=6, d=8, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_supervised_info_nce_is_its_formula(dtype):
    """With classes of one row, which have no positive; native on the CPU, it is one node of autograd."""
    x, labels = rows(9).to(dtype).requires_grad_(), torch.tensor([0, 1, 1, 2, 0, 0, 3, 1, 4])
    temperature = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    unit = nn.functional.normalize(x.double(), dim=1)
    logits, same = unit @ unit.T / temperature, labels[:, None] == labels
    negatives = logits.exp().masked_fill(same, 0).sum(1)
    positives = logits.exp().masked_fill(~same, 0).fill_diagonal_(0).sum(1)
    expected = (negatives.log1p() - positives.log1p()).mean()
    truth = torch.autograd.grad(2 * expected, (x, temperature))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.01}[dtype]
    for backend in ("native", "chunked"):
        with ssl_kernels.use_backend(backend):
            found = adapters.infonce.SupervisedInfoNCE(temperature)(x, labels)
        assert ("ContrastiveLoss" in found.grad_fn.name()) == (backend == "native")
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
        for ours, exact in zip(torch.autograd.grad(2 * found, (x, temperature)), truth, strict=True):
            torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sup_contrast_of_learned_positives(dtype, mode):
    """Where the gradients of the two terms nearly cancel. Under autocast, which would make the products in bfloat16."""
    views = rows(64, 64)[:, None] + 0.4 * rows(128, 64, seed=1).view(64, 2, 64)
    views = nn.functional.normalize(views, dim=2).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = adapters.sup_contrast.SupConLoss(0.07, mode)(views)
    exact = views.detach().double().requires_grad_()
    expected = SupConLoss(0.07, mode)(exact)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-6)
    found.backward()
    expected.backward()
    error = (views.grad - exact.grad).norm() / exact.grad.norm()
    assert error < {torch.float32: 1e-3, torch.float16: 3e-3, torch.bfloat16: 0.02}[dtype]


@pytest.mark.parametrize("mode", ["all", "one"])
def test_sup_contrast_with_a_mask_is_one_graph(mode):
    views = nn.functional.normalize(rows(12).view(6, 2, 8), dim=2)
    mask = (torch.arange(6)[:, None] % 3 == torch.arange(6) % 3).float()
    loss = adapters.sup_contrast.SupConLoss(0.2, mode)
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(views, mask=mask), loss(views, mask=mask))


WRONG_CALLS = {
    r"SupConLoss: mask must have shape \(6, 6\), got \(1, 6\)": ("one", {"mask": torch.ones(1, 6)}),
    r"SupConLoss: mask must have shape \(6, 6\), got \(5, 5\)": ("all", {"mask": torch.ones(5, 5)}),
    r"SupConLoss: mask must have shape \(6, 6\), got \(6,\)": ("all", {"mask": torch.ones(6)}),
    "SupConLoss: mask must be a tensor, got list": ("all", {"mask": [[1] * 6] * 6}),
    "SupConLoss: mask must hold nothing but 0 and 1, got 0.5": ("all", {"mask": torch.full((6, 6), 0.5)}),
    "SupConLoss: labels must be a tensor, got list": ("all", {"labels": [0] * 6}),
    r"SupConLoss: temperature must be a number or .* got shape \(2,\)": (
        "all",
        {"temperature": torch.ones(2)},
    ),
    "SupConLoss: temperature must be a number or .* got str": ("all", {"temperature": "0.1"}),
    "SupConLoss: temperature must be finite and > 0, got 0": ("all", {"temperature": 0}),
    "SupervisedInfoNCE: target must be a tensor, got list": (None, {"target": [0] * 6}),
    "SupervisedInfoNCE: target must be on cpu, got meta": (
        None,
        {"target": torch.zeros(6, device="meta").long()},
    ),
}


@pytest.mark.parametrize("message", WRONG_CALLS)
def test_wrong_arguments_of_losses_by_classes_are_named(message):
    mode, options = WRONG_CALLS[message]
    with pytest.raises((TypeError, ValueError), match=message):
        if mode is None:
            adapters.infonce.SupervisedInfoNCE()(rows(), **options)
        else:
            loss = adapters.sup_contrast.SupConLoss(options.get("temperature", 0.2), mode)
            loss(rows()[:, None], options.get("labels"), options.get("mask"))


def test_a_base_temperature_of_shape_1_leaves_the_loss_without_dimensions():
    losses = [adapters.sup_contrast.SupConLoss(0.2, base_temperature=t) for t in (0.5, torch.tensor([0.5]))]
    torch.testing.assert_close(*(loss(rows(12).view(6, 2, 8)) for loss in losses))


@pytest.mark.parametrize("mode", ["all", "one"])
def test_sup_contrast_brings_labels_and_masks_to_the_features(mode):
    """As the original does; a device without numbers stands for a GPU here."""
    views, labels = torch.ones(6, 2, 8, device="meta"), torch.arange(6) % 3
    loss = adapters.sup_contrast.SupConLoss(0.2, mode)
    for options in ({"labels": labels}, {"mask": labels[:, None] == labels}):
        found = loss(views, **options)
        assert found.device == views.device and found.shape == ()
