"""triplet_loss and nn.TripletLoss: the paper's formula, anchors without triplets, memory, bad input."""

import itertools
import math

import pytest
import torch
from torch import nn

import ssl_kernels
from ssl_kernels import triplet_loss
from ssl_kernels.losses import _semi_hard
from ssl_kernels.recipes.memory import peak_memory
from tests.helpers import BACKENDS, DTYPES, OPERATORS, random_rows, same_bits, saved_bytes
from tests.losses import definitions

MB = 1 << 20
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_distance = pytest.mark.parametrize("distance", ["euclidean", "cosine"])


def labels_of(n, classes):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(n))


def by_definition(x, labels, margin, distance):
    """Loss of each anchor, None for those without a positive or a negative: equation 5 of arXiv:1703.07737 by loops."""
    rows, losses = x.tolist(), []

    def between(a, b):
        cosine = sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))
        if distance == "cosine":
            return 1 - cosine
        return math.sqrt(max(0.0, 2 - 2 * cosine))  # of unit rows

    for i, own in enumerate(labels.tolist()):
        others = [(j, label) for j, label in enumerate(labels.tolist()) if j != i]
        positives = [between(rows[i], rows[j]) for j, label in others if label == own]
        negatives = [between(rows[i], rows[j]) for j, label in others if label != own]
        complete = positives and negatives
        losses.append(max(0.0, margin + max(positives) - min(negatives)) if complete else None)
    return losses


def dense_triplet(embeddings, labels, margin=0.2, distance="euclidean", normalize=True):
    """The reference's losses, NaN for an anchor without a triplet."""
    each = definitions.triplet_loss(embeddings, labels, margin, distance=distance, normalize=normalize)
    members = (labels[:, None] == labels).sum(1)
    return each.masked_fill((members == 1) | (members == len(labels)), torch.nan)


@every_backend
@every_distance
@pytest.mark.parametrize("n, classes", [(2, 1), (3, 2), (9, 3), (20, 12)])
def test_value_is_the_papers(backend, distance, n, classes):
    x, labels = random_rows(n, 4, torch.float64), labels_of(n, classes)
    expected = by_definition(x, labels, 0.3, distance)
    options = {"margin": 0.3, "distance": distance, "backend": backend}
    each = triplet_loss(x, labels, reduction="none", **options)
    assert each.tolist() == pytest.approx([loss or 0.0 for loss in expected], rel=1e-12, abs=1e-12)
    counted = [loss for loss in expected if loss is not None]
    total, mean = math.fsum(counted), math.fsum(counted) / max(1, len(counted))
    assert triplet_loss(x, labels, reduction="sum", **options).item() == pytest.approx(total)
    assert triplet_loss(x, labels, **options).item() == pytest.approx(mean)


@every_backend
@every_distance
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_those_of_the_dense_loss(backend, distance, normalize):
    x, labels = random_rows(150, 7, torch.float64).requires_grad_(), labels_of(150, 40)
    margin = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    weight = random_rows(150, 1, torch.float64)[:, 0]
    dense = dense_triplet(x, labels, margin, distance, normalize)
    complete = ~dense.isnan()
    assert 0 < complete.sum() < 150
    options = {"distance": distance, "normalize": normalize, "backend": backend}
    for ours, plain in (
        (triplet_loss(x, labels, margin, **options), dense[complete].mean()),
        (triplet_loss(x, labels, margin, reduction="sum", **options), dense[complete].sum()),
        (
            (weight * triplet_loss(x, labels, margin, reduction="none", **options)).sum(),
            (weight * dense)[complete].sum(),
        ),
    ):
        torch.testing.assert_close(ours, plain)
        found = torch.autograd.grad(ours, (x, margin))
        expected = torch.autograd.grad(plain, (x, margin), retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_as_accurate_as_its_dtype(backend, dtype):
    x, labels = random_rows(130, 33, dtype), labels_of(130, 30)
    truth = dense_triplet(x.double(), labels).nanmean().item()
    found = triplet_loss(x, labels, backend=backend)
    assert found.item() == pytest.approx(truth, rel=1e-5)


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_dtype_and_shape(backend, dtype, reduction):
    x = random_rows(9, 8, dtype).requires_grad_()
    loss = triplet_loss(x, torch.arange(9) % 3, reduction=reduction, backend=backend)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.shape == ((9,) if reduction == "none" else ())
    loss.sum().backward()
    assert x.grad.dtype == dtype and x.grad.shape == x.shape


@every_backend
@every_distance
def test_gradcheck(backend, distance):
    x = random_rows(6, 3, torch.float64).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1, 0, 2])
    margin = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    for reduction in ("mean", "none"):

        def loss(x, margin, reduction=reduction):
            options = {"reduction": reduction, "distance": distance, "backend": backend}
            return triplet_loss(x, labels, margin, **options)

        assert torch.autograd.gradcheck(loss, (x, margin))
        assert torch.autograd.gradgradcheck(loss, (x, margin))


@every_backend
@every_distance
@pytest.mark.parametrize(
    "labels", [torch.arange(5), torch.zeros(5, dtype=torch.int64)], ids=["alone", "same"]
)
def test_no_triplet_at_all_is_0_with_gradient_0(backend, distance, labels):
    for n in (1, 5):
        x = random_rows(n, 4).requires_grad_()
        for reduction in ("mean", "sum", "none"):
            options = {"distance": distance, "reduction": reduction, "backend": backend}
            loss = triplet_loss(x, labels[:n], **options)
            assert (loss == 0).all()
            (grad,) = torch.autograd.grad(loss.sum(), x)
            assert (grad == 0).all()


@every_backend
@every_distance
def test_equal_rows_have_finite_gradients(backend, distance):
    """At distance 0 the gradient of the distance is 0."""
    x = torch.ones(8, 3, requires_grad=True)
    loss = triplet_loss(x, torch.arange(8) % 2, 0.5, distance=distance, backend=backend)
    assert loss.item() == pytest.approx(0.5, abs=1e-6)
    assert torch.autograd.grad(loss, x)[0].isfinite().all()


@every_backend
@every_distance
def test_width_one_zero_rows_and_float16_near_overflow(backend, distance):
    narrow = torch.tensor([[3.0], [-2.0], [0.0], [5.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1])
    for x in (narrow, narrow.expand(4, 3) * 1e4):
        x = x.half().double()
        expected = dense_triplet(x, labels, distance=distance).mean().item()
        leaf = x.half().requires_grad_()
        loss = triplet_loss(leaf, labels, distance=distance, backend=backend)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert (
            grad[[0, 1, 3]].isfinite().all()
        )  # that of a row of zeros is 1e12 times another's, beyond float16


@every_backend
@every_distance
def test_nan_reaches_the_loss(backend, distance):
    x, labels = random_rows(300, 8), labels_of(300, 20)
    x[280, 3] = torch.nan
    assert triplet_loss(x, labels, distance=distance, backend=backend).isnan()
    each = triplet_loss(x, labels, reduction="none", distance=distance, backend=backend)
    assert each.isnan().all()


@every_backend
def test_gradient_is_the_same_bit_for_bit(backend):
    x, labels = random_rows(700, 40).requires_grad_(), labels_of(700, 9)
    first = torch.autograd.grad(triplet_loss(x, labels, 2.0, backend=backend), x)[0]
    for _ in range(3):
        again = torch.autograd.grad(triplet_loss(x, labels, 2.0, backend=backend), x)[0]
        assert same_bits(first, again)


@every_backend
def test_labels_of_any_integer_type(backend):
    x, labels = random_rows(30, 8), labels_of(30, 4)
    expected = triplet_loss(x, labels, backend=backend)
    for dtype in (torch.int32, torch.uint8, torch.int16, torch.uint64):
        assert same_bits(triplet_loss(x, labels.to(dtype), backend=backend), expected)
    assert same_bits(triplet_loss(x, labels[:, None], backend=backend), expected)
    two = labels % 2
    assert same_bits(triplet_loss(x, two.bool(), backend=backend), triplet_loss(x, two, backend=backend))


@pytest.mark.filterwarnings("ignore")
@every_backend
@every_distance
def test_compiles_without_a_graph_break(backend, distance):
    torch._dynamo.reset()
    loss = ssl_kernels.nn.TripletLoss(0.5, distance=distance, backend=backend)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, labels = random_rows(12, 8).requires_grad_(), torch.arange(12) % 4
    found, eager = (torch.autograd.grad(f(x, labels), x)[0] for f in (compiled, loss))
    torch.testing.assert_close(found, eager)


@pytest.mark.parametrize("backend", OPERATORS)
def test_memory_is_far_from_the_matrix_of_distances(backend):
    """At N = 4096 the distances alone would be 64 MB."""
    x, labels = random_rows(4096, 16).requires_grad_(), labels_of(4096, 500)
    assert saved_bytes(triplet_loss, x, labels, backend=backend) < 10 * x.nbytes
    if backend == "native":
        assert peak_memory(lambda: triplet_loss(x, labels, backend=backend).backward()) < 16 * x.nbytes


@every_distance
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_semi_hard_in_blocks_is_the_reference(distance, reduction, monkeypatch):
    """A sum makes its gradients in forward, each anchor's loss in backward; 7 classes of 1 to 12 rows, two rows equal,
    of which either may be the negative, and two nearly."""
    monkeypatch.setattr(_semi_hard, "PAIRS_PER_BLOCK", 100)
    x, labels = random_rows(33, 6, torch.float64), labels_of(33, 7)
    x[3], x[5] = x[4], x[6] + 1e-4
    weights = random_rows(33, 1, torch.float64)[:, 0] if reduction == "none" else torch.tensor(0.7).double()
    found = []
    for dtype, backend in (
        (torch.float64, "reference"),
        (torch.float64, "chunked"),
        (torch.float64, "native"),
        (torch.float32, "chunked"),
        (torch.float32, "native"),
    ):
        rows, margin = x.to(dtype).requires_grad_(), torch.tensor(0.3, dtype=dtype, requires_grad=True)
        options = {"mining": "semi_hard", "distance": distance, "reduction": reduction, "backend": backend}
        loss = triplet_loss(rows, labels, margin, **options)
        gradients = torch.autograd.grad(loss, (rows, margin), weights.to(loss.dtype), retain_graph=True)
        again = torch.autograd.grad(loss, (rows, margin), weights.to(loss.dtype))
        torch.testing.assert_close(again, gradients, rtol=0, atol=0)
        gradients[0][3] += gradients[0][4]
        gradients[0][4] = 0
        found.append([each.double() for each in (loss, *gradients)])
    for ours, tolerance in zip(found[1:], (1e-9, 1e-9, 1e-4, 1e-4), strict=True):
        torch.testing.assert_close(ours, found[0], rtol=tolerance, atol=tolerance)


@every_distance
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("margin", [0.3, "soft"])
@pytest.mark.parametrize("n, classes", [(1, 1), (5, 1), (4, 4), (40, 2), (600, 150)])
def test_semi_hard_in_one_node_is_the_reference(n, classes, margin, normalize, distance):
    """Up to 600 rows, which are two blocks, with every number of threads the same bit for bit."""
    x, labels = random_rows(n, 5, torch.float64).requires_grad_(), labels_of(n, classes)
    options = {"mining": "semi_hard", "distance": distance, "normalize": normalize, "reduction": "sum"}
    expected = triplet_loss(x, labels, margin, backend="reference", **options)
    truth = torch.autograd.grad(3 * expected, x)[0]
    found, threads = [], torch.get_num_threads()
    for count in (1, 2):
        torch.set_num_threads(count)
        loss = triplet_loss(x, labels, margin, backend="native", **options)
        assert "SemiHard" in loss.grad_fn.name()
        found += [loss.detach(), torch.autograd.grad(3 * loss, x)[0]]
    torch.set_num_threads(threads)
    assert same_bits(found[0], found[2]) and same_bits(found[1], found[3])
    torch.testing.assert_close(found[0], expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[1], truth, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        assert same_bits(triplet_loss(x, labels, margin, backend="native", **options), found[0])


@every_distance
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_semi_hard_of_narrow_rows_rounds_the_gradient_once(dtype, distance):
    x, labels = random_rows(24, 6, dtype).requires_grad_(), labels_of(24, 6)
    wide = x.detach().double().requires_grad_()
    losses = [triplet_loss(y, labels, mining="semi_hard", distance=distance) for y in (x, wide)]
    (ours,), (truth,) = (
        torch.autograd.grad(1024 * loss, y) for loss, y in zip(losses, (x, wide), strict=True)
    )
    assert losses[0].dtype == torch.float32 and ours.dtype == dtype
    torch.testing.assert_close(losses[0].double(), losses[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=0.01)


@every_backend
def test_semi_hard_of_rows_that_are_not_finite_or_far_from_1(backend):
    """A NaN is a negative only of anchors for which no other row is left; lengths whose squares leave float32."""
    x, labels = random_rows(8, 4, torch.float64), torch.tensor([0, 0, 1, 1, 2, 2, 2, 3])
    broken = x.clone()
    broken[7, 1] = torch.nan
    options = {"mining": "semi_hard", "normalize": False, "backend": backend}
    assert triplet_loss(broken, labels, **options).isnan()
    assert triplet_loss(10 * x, labels, **options).isfinite()
    near = torch.cat(
        (x[:4], 100 + x[4:7], broken[7:])
    )  # of which each of the first four has a farther negative
    assert triplet_loss(near[[0, 1, 2, 3, 4, 7]], torch.tensor([0, 0, 1, 1, 2, 3]), **options).isfinite()
    broken[1, 0] = torch.nan
    assert triplet_loss(broken, labels, mining="semi_hard", backend=backend).isnan()
    for factor in () if backend == "reference" else (1e-25, 1e25):  # its squares are float32
        far = (x.float() * factor).requires_grad_()
        loss = triplet_loss(far, labels, 0.0, **options)
        expected = triplet_loss(far.detach().double(), labels, 0.0, **options)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
        assert torch.autograd.grad(loss, far)[0].isfinite().all()


@every_backend
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_semi_hard_takes_a_nan_of_either_sign_for_the_farthest(backend, distance, value):
    """That of an infinite row, which is inf / inf, has its sign set on many processors."""
    x = torch.tensor([[0.5, 0.1], [3, -1], [1, 0.2], [0, 0]])
    x[3] = value
    options = {"mining": "semi_hard", "distance": distance, "backend": backend}
    assert triplet_loss(x, torch.tensor([0, 0, 1, 2]), **options).isnan()  # no other is farther than the pair
    x[2] = torch.tensor([-1.0, 0])
    assert triplet_loss(x, torch.tensor([0, 0, 1, 2]), **options).isfinite()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_semi_hard_of_equal_rows_of_two_labels(backend, dtype):
    """At distance 0 as the pair is, which is not farther: the other row is the negative, whatever is rounded."""
    for seed in range(6):
        row, other = random_rows(2, 501, dtype, seed=seed)
        x, labels = torch.stack((row, row, row, other)).requires_grad_(), torch.tensor([0, 0, 1, 2])
        found = triplet_loss(x, labels, 2.0, mining="semi_hard", reduction="none", backend=backend)
        unit = torch.nn.functional.normalize(x, dim=1)
        apart = (unit[0] - unit[3]).norm()
        torch.testing.assert_close(found[:2], (2 - apart).expand(2))
        mean = triplet_loss(x, labels, 2.0, mining="semi_hard", backend=backend)
        torch.testing.assert_close(mean, 2 - apart)
        # The pair itself, at distance 0, pulls at nothing; half of each of both losses is the first row's.
        (found,), (expected,) = (torch.autograd.grad(each, x) for each in (mean, -apart))
        assert found.isfinite().all()
        torch.testing.assert_close(found[3], expected[3])
        torch.testing.assert_close(found[:2].sum(0), expected[0])


@every_backend
def test_semi_hard_of_negatives_that_are_as_far(backend):
    """Of several nearest ones the first, and where none is farther than the pair the last of the farthest."""
    places = [[0, 0], [1, 0], [3, 4], [4, 3], [-3, 4], [0, 5], [30, 40], [-30, 40], [40, 30], [60, 80]]
    labels = [0, 0, 1, 2, 3, 4, 5, 5, 6, 7]
    x = torch.tensor(places, dtype=torch.float64, requires_grad=True)
    expected = 0
    for i, p in itertools.permutations(range(10), 2):
        if labels[i] != labels[p]:
            continue
        distances = (x[i] - x).norm(dim=1)
        others = sorted((j for j in range(10) if labels[j] != labels[i]), key=lambda j: distances[j].item())
        chosen = next((j for j in others if distances[j] > distances[p]), others[-1])
        expected = expected + (distances[p] - distances[chosen] + 90).clamp_min(0)
    options = {"mining": "semi_hard", "normalize": False, "reduction": "sum", "backend": backend}
    found = triplet_loss(x, torch.tensor(labels), 90.0, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, x), torch.autograd.grad(expected, x))


@every_backend
def test_semi_hard_at_its_margin_has_no_gradient(backend):
    """A loss of exactly 0 is on the flat side, as that of relu."""
    x = torch.tensor([[0.0, 0], [5, 0], [0, 10]], requires_grad=True)
    options = {"mining": "semi_hard", "normalize": False, "backend": backend}
    margin = torch.tensor(5.0, requires_grad=True)
    loss = triplet_loss(x, torch.tensor([0, 0, 1]), margin, **options)
    assert loss == 0 and not any(grad.any() for grad in torch.autograd.grad(loss, (x, margin)))


def test_semi_hard_of_several_blocks_of_narrow_rows():
    """Of lengths of their own, which distances by products need."""
    rows, labels = random_rows(600, 4, torch.float32, spread=0.5), labels_of(600, 150)
    results = []
    for x in (rows.clone().requires_grad_(), rows.double().requires_grad_()):
        loss = triplet_loss(x, labels, 0.3, mining="semi_hard", normalize=False)
        results.append((loss.detach().double(), torch.autograd.grad(loss, x)[0].double()))
    (loss, grad), (exact, truth) = results
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, truth, rtol=1e-3, atol=1e-5 * truth.abs().max().item())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_semi_hard_refuses_a_second_derivative(reduction):
    x = random_rows(9, 4).requires_grad_()
    loss = triplet_loss(x, labels_of(9, 3), mining="semi_hard", reduction=reduction).sum()
    (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(
        RuntimeError, match=r'^triplet_loss: .* has no second derivative; backend="reference" has one'
    ):
        gradient.sum().backward()


def test_module_is_the_function():
    x, labels = random_rows(20, 8), labels_of(20, 4)
    for options in ({}, {"normalize": False}, {"reduction": "none"}, {"distance": "cosine"}):
        assert same_bits(
            ssl_kernels.nn.TripletLoss(0.4, **options)(x, labels), triplet_loss(x, labels, 0.4, **options)
        )
    module = ssl_kernels.nn.TripletLoss(nn.Parameter(torch.tensor(0.4)))
    assert list(module.state_dict()) == ["margin"]


Z, LABELS = torch.ones(4, 8), torch.arange(4)
BAD_CALLS = {
    "list": (TypeError, "embeddings must be a tensor, got list", ([[1.0]], LABELS)),
    "integers": (TypeError, "embeddings must be .*, got int64", (Z.long(), LABELS)),
    "empty": (ValueError, r"embeddings must have .*, got \(0, 8\)", (Z[:0], LABELS[:0])),
    "labels list": (TypeError, "labels must be a tensor, got list", (Z, [0, 1, 2, 3])),
    "labels float": (TypeError, "labels must be an integer tensor, got float32", (Z, LABELS.float())),
    "labels short": (ValueError, r"labels must have shape \(4,\), got \(3,\)", (Z, LABELS[:3])),
    "labels 2-d": (
        ValueError,
        r"labels must have shape \(4,\), got \(4, 2\)",
        (Z, LABELS[:, None].expand(4, 2)),
    ),
    "labels elsewhere": (ValueError, "labels must be on cpu, got meta", (Z, LABELS.to("meta"))),
    "margin negative": (ValueError, "margin must be >= 0, got -1", (Z, LABELS, -1)),
    "margin nan": (ValueError, "margin must be finite, got nan", (Z, LABELS, math.nan)),
    "margin str": (
        TypeError,
        "margin must be a number or a tensor of one element, got str",
        (Z, LABELS, "1"),
    ),
}
BAD_OPTIONS = {
    "mining": ('mining must be "batch_hard" or "semi_hard", got \'all\'', {"mining": "all"}),
    "distance": (
        'distance must be "euclidean" or "cosine", got \'squared\'',
        {"distance": "squared"},
    ),
    "reduction": ("reduction must be .*, got 'avg'", {"reduction": "avg"}),
    "backend": ('backend "triton" cannot run this call: ', {"backend": "triton"}),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_named(name):
    error, message, arguments = BAD_CALLS[name]
    with pytest.raises(error, match=f"^triplet_loss: {message}"):
        triplet_loss(*arguments)


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_option_is_named(name):
    message, options = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=f"^triplet_loss: {message}"):
        triplet_loss(Z, LABELS, **options)


def test_backends_for_takes_the_calls_arguments():
    assert ssl_kernels.backends_for(triplet_loss, Z, LABELS, torch.tensor(0.2))["chunked"] is None
