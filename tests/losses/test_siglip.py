"""siglip_loss and nn.SigLIPLoss: the paper's formula, memory, and every message for bad input."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ssl_kernels
from ssl_kernels import siglip_loss
from ssl_kernels.recipes.memory import peak_memory
from tests.helpers import BACKENDS, DTYPES, OPERATORS, random_rows, same_bits, saved_bytes

MB = 1 << 20
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def features(n, d, dtype=torch.float32):
    """Images and texts that resemble each other."""
    common = random_rows(n, d, torch.float64)
    return [(common + 0.5 * random_rows(n, d, torch.float64, seed=k)).to(dtype) for k in (1, 2)]


def plain_siglip(image_features, text_features, scale, bias):
    """As open_clip writes it."""
    x, y = F.normalize(image_features, dim=1), F.normalize(text_features, dim=1)
    logits = scale * x @ y.T + bias
    labels = 2 * torch.eye(len(x), dtype=x.dtype) - torch.ones_like(logits)
    return -F.logsigmoid(labels * logits).sum() / len(x)


@every_backend
@pytest.mark.parametrize("n", [1, 2, 7])
def test_value_is_the_papers(backend, n):
    """Algorithm 1 of arXiv:2303.15343 by explicit loops in float64."""
    x, y = features(n, 5, torch.float64)
    rows = []
    for i in range(n):
        u = x[i].tolist()
        terms = []
        for j in range(n):
            v = y[j].tolist()
            cosine = sum(a * b for a, b in zip(u, v, strict=True)) / (math.hypot(*u) * math.hypot(*v))
            sign = 1 if i == j else -1
            terms.append(-math.log(1 / (1 + math.exp(sign * (-10 * cosine + 9)))))
        rows.append(math.fsum(terms))
    each = siglip_loss(x, y, 10.0, -9.0, reduction="none", backend=backend)
    assert each.tolist() == pytest.approx(rows, rel=1e-11)
    assert siglip_loss(x, y, 10.0, -9.0, backend=backend).item() == pytest.approx(math.fsum(rows) / n)
    assert siglip_loss(x, y, 10.0, -9.0, reduction="sum", backend=backend).item() == pytest.approx(
        math.fsum(rows)
    )


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dtype_and_shape(backend, dtype, reduction):
    x, y = (z.requires_grad_() for z in features(9, 8, dtype))
    loss = siglip_loss(x, y, 10.0, -10.0, reduction=reduction, backend=backend)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ((9,) if reduction == "none" else ())
    loss.sum().backward()
    assert x.grad.dtype == y.grad.dtype == dtype


@every_backend
def test_gradients_of_every_reduction(backend):
    """Mean, sum and weighted rows agree with plain PyTorch, by features, scale and bias."""
    weight = random_rows(33, 1, torch.float64)[:, 0]
    leaves = [*features(33, 8, torch.float64), torch.tensor(10.0), torch.tensor(-9.0)]
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def grads(value):
        return torch.autograd.grad(value, leaves)

    plain = grads(plain_siglip(*leaves))
    each = siglip_loss(*leaves, reduction="none", backend=backend)
    for found in (
        grads(siglip_loss(*leaves, backend=backend)),
        grads(siglip_loss(*leaves, reduction="sum", backend=backend) / 33),
        grads(each.mean()),
    ):
        for ours, theirs in zip(found, plain, strict=True):
            torch.testing.assert_close(ours, theirs)
    reference = siglip_loss(*leaves, reduction="none", backend="reference")
    weighted = grads((weight * siglip_loss(*leaves, reduction="none", backend=backend)).sum())
    for ours, theirs in zip(weighted, grads((weight * reference).sum()), strict=True):
        torch.testing.assert_close(ours, theirs)


@every_backend
def test_gradcheck(backend):
    x, y = (z.requires_grad_() for z in features(4, 3, torch.float64))
    scale, bias = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (4.0, -2.0))
    for normalize in (True, False):
        for reduction in ("mean", "none"):
            options = {"normalize": normalize, "reduction": reduction, "backend": backend}
            assert torch.autograd.gradcheck(
                lambda *a, options=options: siglip_loss(*a, **options), (x, y, scale, bias)
            )


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_float16_gradients_of_a_large_sum_do_not_overflow_on_the_way(backend, reduction):
    """Long float16 rows and a large scale: the gradient of the sum leaves float16, that of the mean does not."""
    x, y = (1e-3 * z for z in features(200, 8, torch.float16))
    x, y = x.requires_grad_(), y.requires_grad_()
    value = siglip_loss(x, y, 100.0, 0.0, reduction=reduction, backend=backend)
    found = torch.autograd.grad(value / (200 if reduction == "sum" else 1), (x, y))
    wide = [z.detach().double().requires_grad_() for z in (x, y)]
    truth = torch.autograd.grad(plain_siglip(*wide, 100.0, 0.0), wide)
    assert max((200 * grad).abs().max() for grad in truth) > torch.finfo(torch.float16).max
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-3, atol=1e-2)


@every_backend
def test_float16_features_near_overflow(backend):
    x, y = ((z / z.abs().max() * 6e4) for z in features(70, 16, torch.float64))
    x, y = x.half(), y.half()
    value = siglip_loss(x.requires_grad_(), y, 10.0, -10.0, backend=backend)
    assert value.item() == pytest.approx(plain_siglip(x.double(), y.double(), 10.0, -10.0).item(), rel=1e-5)
    assert torch.autograd.grad(value, x)[0].isfinite().all()


@every_backend
def test_width_one_and_batch_one(backend):
    x, y = torch.tensor([[3.0], [-2.0]]), torch.tensor([[5.0], [1.0]])
    for rows in (1, 2):
        assert siglip_loss(x[:rows], y[:rows], 2.0, 0.5, backend=backend).item() == pytest.approx(
            plain_siglip(x[:rows], y[:rows], 2.0, 0.5).item()
        )


@pytest.mark.filterwarnings("ignore")
@every_backend
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_with_a_learnable_scale_and_bias(backend, reduction):
    torch._dynamo.reset()
    scale, bias = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-10.0))
    loss = ssl_kernels.nn.SigLIPLoss(scale, bias, reduction=reduction, backend=backend)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, y = (z.requires_grad_() for z in features(6, 8))
    leaves = (x, y, scale, bias)
    found = torch.autograd.grad(compiled(x, y).sum(), leaves)
    for ours, eager in zip(found, torch.autograd.grad(loss(x, y).sum(), leaves), strict=True):
        torch.testing.assert_close(ours, eager)


@pytest.mark.parametrize("backend", OPERATORS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_memory_is_far_from_the_matrix_of_logits(backend, reduction):
    """At N = 4096 the logits alone would be 64 MB, and plain PyTorch keeps several such matrices."""
    x, y = (z.requires_grad_() for z in features(4096, 16))

    def loss():
        return siglip_loss(x, y, 10.0, -10.0, reduction=reduction, backend=backend).mean()

    assert saved_bytes(loss) < 5 * x.nbytes
    if backend == "native":
        assert peak_memory(lambda: loss().backward()) < 8 * MB


@every_backend
def test_one_text_an_image_is_the_loss_without_an_index(backend):
    x, y = features(33, 8, torch.float64)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    plain = siglip_loss(x, y, 10.0, -9.0, backend=backend)
    assert siglip_loss(x, y[order], 10.0, -9.0, image_index=order, backend=backend) == pytest.approx(plain)
    twice = {"image_index": torch.arange(33).repeat(2), "backend": backend}
    repeated = siglip_loss(x, torch.cat((y, y)), 10.0, -9.0, **twice)
    assert repeated == pytest.approx(plain)


def test_module_is_the_function():
    x, y = features(9, 8)
    index = torch.arange(9) // 3
    for marks in ({"ids": index}, {"image_index": index}):
        module = ssl_kernels.nn.SigLIPLoss(5.0, -3.0)
        assert same_bits(module(x, y, **marks), siglip_loss(x, y, 5.0, -3.0, **marks))
    for options in ({}, {"normalize": False}, {"reduction": "none"}, {"backend": "chunked"}):
        module = ssl_kernels.nn.SigLIPLoss(5.0, -3.0, **options)
        assert same_bits(module(x, y), siglip_loss(x, y, 5.0, -3.0, **options))
    scale, bias = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-10.0))
    module = ssl_kernels.nn.SigLIPLoss(scale, bias)
    assert sorted(module.state_dict()) == ["logit_bias", "logit_scale"]
    module(x, y).backward()
    assert scale.grad.item() != 0 and bias.grad.item() != 0


Z = torch.ones(4, 8)
BAD_CALLS = {
    "list": (TypeError, "image_features must be a tensor, got list", ([[1.0]], Z, 10.0, -10.0)),
    "integers": (TypeError, "image_features must be .*, got int64", (Z.long(), Z.long(), 10.0, -10.0)),
    "dtypes": (TypeError, "text_features must be float32 as .*, got float64", (Z, Z.double(), 10.0, -10.0)),
    "empty": (ValueError, r"image_features must have .*, got \(0, 8\)", (Z[:0], Z[:0], 10.0, -10.0)),
    "rows": (ValueError, "text_features must have 4 rows as .*, got 3", (Z, Z[:3], 10.0, -10.0)),
    "widths": (ValueError, "text_features must have width 8 as .*, got 7", (Z, Z[:, :7], 10.0, -10.0)),
    "scale nan": (ValueError, "logit_scale must be finite, got nan", (Z, Z, math.nan, -10.0)),
    "scale of two": (ValueError, r"logit_scale must be .* got shape \(2,\)", (Z, Z, torch.ones(2), -10.0)),
    "bias str": (
        TypeError,
        "logit_bias must be a number or a tensor of one element, got str",
        (Z, Z, 10.0, "0"),
    ),
    "bias inf": (ValueError, "logit_bias must be finite, got -inf", (Z, Z, 10.0, -math.inf)),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_named(name):
    error, message, arguments = BAD_CALLS[name]
    with pytest.raises(error, match=f"^siglip_loss: {message}"):
        siglip_loss(*arguments)


def test_bad_marks_are_named():
    index, texts = torch.zeros(6, dtype=torch.long), torch.ones(6, 8)
    for arguments, options, message in (
        ((Z, Z), {"ids": torch.zeros(3).long()}, r"ids must have shape \(4,\), got \(3,\)"),
        ((Z, texts), {"ids": torch.zeros(4).long()}, "text_features must have 4 rows as .*, got 6"),
        ((Z, texts), {"image_index": index[:4]}, r"image_index must have shape \(6,\), got \(4,\)"),
        ((Z, texts), {"image_index": index + 4}, r"image_index must be in \[0, 4\), got 4"),
        ((Z, texts), {"image_index": index, "ids": index}, "ids must be None with image_index"),
    ):
        with pytest.raises(ValueError, match=f"^siglip_loss: {message}"):
            siglip_loss(*arguments, 10.0, -10.0, **options)


def test_bad_option_is_named():
    with pytest.raises(ValueError, match=r"^siglip_loss: reduction must be .*, got 'avg'"):
        siglip_loss(Z, Z, 10.0, -10.0, reduction="avg")
    with pytest.raises(ValueError, match=r'^siglip_loss: backend "triton" cannot run this call: '):
        siglip_loss(Z, Z, 10.0, -10.0, backend="triton")


def test_backends_for_takes_the_calls_arguments():
    arguments = (Z, Z, torch.tensor(10.0), torch.tensor(-10.0))
    assert ssl_kernels.backends_for(siglip_loss, *arguments)["chunked"] is None
