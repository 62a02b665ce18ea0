"""`mixup_cross_entropy` on every backend of the CPU, against `F.cross_entropy` with dense targets in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import ssl_kernels
from ssl_kernels import mixup_cross_entropy
from tests.helpers import BACKENDS, DTYPES, OPERATORS, saved_bytes
from tests.support.mixing import (
    CrossEntropyCall,
    accumulation,
    check_cross_entropy,
    in_layout,
    random_batch,
    random_permutation,
    shares_of,
)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_operator = pytest.mark.parametrize("backend", OPERATORS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def dense_target(target, permutation, lam, classes):
    one_hot = F.one_hot(target, classes).double()
    share = lam.double()[:, None]
    return share * one_hot + (1 - share) * one_hot[permutation]


def check(backend, logits, target, permutation, lam, label_smoothing):
    grad_loss = torch.linspace(-1, 2, len(logits), dtype=torch.float64)
    call = CrossEntropyCall(logits, target, permutation, lam, grad_loss, label_smoothing)
    leaves = logits.detach().requires_grad_(), lam.detach().requires_grad_()
    found = mixup_cross_entropy(
        leaves[0], target, permutation, leaves[1], label_smoothing=label_smoothing, reduction="none", backend=backend
    )  # fmt: skip
    assert found.dtype == accumulation(logits.dtype)
    grads = torch.autograd.grad(found, leaves, grad_loss.to(found.dtype))
    check_cross_entropy(call, found, *grads, plain=True)


@every_backend
@given(
    n=st.integers(1, 20),
    classes=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["contiguous", "cropped", "batch_last", "every_other_sample"]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    scale=st.sampled_from([0.1, 3.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_matches_float64(backend, n, classes, dtype, layout, label_smoothing, scale, seed):
    logits, _ = in_layout(scale * random_batch((n, classes), dtype, seed), layout)
    target = torch.randint(classes, (n,), generator=torch.Generator().manual_seed(seed))
    lam, permutation = shares_of(n, dtype, seed), random_permutation(n, seed)
    check(backend, logits, target, permutation, lam, label_smoothing)


@every_operator
@every_dtype
@pytest.mark.parametrize("n, classes", [(300, 1000), (3, 40000)])
def test_matches_float64_at_usual_sizes(backend, dtype, n, classes):
    logits = 3 * random_batch((n, classes), dtype)
    target = torch.arange(n) % classes
    check(backend, logits, target, random_permutation(n), shares_of(n, dtype), 0.1)


@every_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(backend, reduction):
    logits, target = random_batch((6, 5), torch.float32), torch.tensor([0, 1, 2, 3, 4, 0])
    permutation = random_permutation(6)
    dense = dense_target(target, permutation, torch.full((6,), 0.3), 5).float()
    expected = F.cross_entropy(logits, dense, reduction=reduction)
    found = mixup_cross_entropy(logits, target, permutation, 0.3, reduction=reduction, backend=backend)
    torch.testing.assert_close(found, expected)


@every_backend
def test_gradcheck(backend):
    logits = random_batch((5, 4), torch.float64).requires_grad_()
    lam = torch.tensor([0.2, 0.9, 0.1, 0.7, 0.4], dtype=torch.float64, requires_grad=True)
    target, permutation = torch.tensor([0, 3, 3, 1, 2]), torch.tensor([2, 0, 1, 3, 4])

    def run(logits, lam):
        return mixup_cross_entropy(logits, target, permutation, lam, label_smoothing=0.1, backend=backend)

    assert torch.autograd.gradcheck(run, (logits, lam))
    assert torch.autograd.gradgradcheck(run, (logits, lam))


@every_backend
@every_dtype
def test_classes_left_out_by_minus_infinity(backend, dtype):
    """Also where they are the target of a partner that counts nothing."""
    logits = random_batch((3, 40), dtype)
    logits[0, 5] = logits[1, 7] = -torch.inf
    target, permutation = torch.tensor([1, 2, 5]), torch.tensor([2, 0, 1])
    lam = torch.tensor([1.0, 0.5, 0.5]).to(accumulation(dtype))
    logits.requires_grad_()
    losses = mixup_cross_entropy(logits, target, permutation, lam, reduction="none", backend=backend)
    assert losses.isfinite().all()
    losses.sum().backward()
    assert logits.grad.isfinite().all()
    assert logits.grad[0, 5] == logits.grad[1, 7] == 0


@every_backend
def test_nan_stays_in_its_row(backend):
    logits = random_batch((4, 37), torch.float32)
    logits[2, 36] = torch.nan
    logits.requires_grad_()
    losses = mixup_cross_entropy(
        logits, torch.arange(4), torch.tensor([1, 2, 3, 0]), 0.3, reduction="none", backend=backend
    )
    assert losses.isnan().tolist() == [False, False, True, False]
    losses.sum().backward()
    assert logits.grad.isnan().any(1).tolist() == [False, False, True, False]


@every_backend
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_large_logits(backend, offset):
    logits = random_batch((6, 50), torch.float32) * 100 + offset
    check(backend, logits, torch.arange(6), random_permutation(6), shares_of(6), 0.1)


def test_no_dense_target_is_saved():
    logits = torch.randn(64, 1000, requires_grad=True)
    saved = saved_bytes(
        mixup_cross_entropy, logits, torch.arange(64), random_permutation(64), 0.3, backend="native"
    )
    assert saved <= logits.nbytes + 64 * 64


def terms_apart(
    logits, target, partner_target, lam, *, weight=None, ignore_index=-100, reduction="none", **options
):
    """By definition: `F.cross_entropy` of both classes with their shares, the mean by the weights that count."""
    options |= {"weight": weight, "ignore_index": ignore_index, "reduction": "none"}
    own, partner = (F.cross_entropy(logits, t, **options) for t in (target, partner_target))
    share = lam.view(-1, *[1] * (own.dim() - 1))
    losses = share * own + (1 - share) * partner
    if reduction == "none":
        return losses
    weight = logits.new_ones(logits.shape[1]) if weight is None else weight
    counts = (
        weight[t.masked_fill(t == ignore_index, 0)] * (t != ignore_index) for t in (target, partner_target)
    )
    own, partner = counts
    return losses.sum() / ((share * own + (1 - share) * partner).sum() if reduction == "mean" else 1)


def classes_of(shape, classes, ignore_index, seed=0):
    """Random classes, a third of them to be ignored."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, shape, generator=generator)
    return target.masked_fill(torch.rand(shape, generator=generator) < 0.3, ignore_index)


@every_backend
@given(
    n=st.integers(1, 12),
    classes=st.integers(3, 70),
    dtype=st.sampled_from(DTYPES),
    weighted=st.booleans(),
    ignore_index=st.sampled_from([-100, 2, 255]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    direct=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_weights_and_ignored_classes_match_float64(
    backend, n, classes, dtype, weighted, ignore_index, label_smoothing, reduction, direct, seed
):
    logits, target = (
        3 * random_batch((n, classes), dtype, seed),
        classes_of((n,), classes, ignore_index, seed),
    )
    acc, permutation = accumulation(dtype), random_permutation(n, seed)
    generator = torch.Generator().manual_seed(seed)
    lam = torch.rand(n, generator=generator, dtype=torch.float64).to(acc)
    weight = torch.rand(classes, generator=generator, dtype=torch.float64).to(acc) + 0.1 if weighted else None
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "reduction": reduction}
    z, share = (tensor.double().requires_grad_() for tensor in (logits, lam))
    wide = None if weight is None else weight.double()
    exact = terms_apart(z, target, target[permutation], share, weight=wide, **options)
    logits.requires_grad_()
    lam.requires_grad_()
    partner = {"partner_target": target[permutation]} if direct else {"permutation": permutation}
    found = mixup_cross_entropy(logits, target, lam=lam, weight=weight, backend=backend, **partner, **options)
    assert (found.dtype, found.shape) == (acc, exact.shape)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)
    upstream = torch.linspace(-1, 2, n, dtype=torch.float64) if reduction == "none" else torch.tensor(1.0)
    to_z, to_lam = torch.autograd.grad(found, (logits, lam), upstream.to(found.dtype))
    exact_to_z, exact_to_lam = torch.autograd.grad(exact, (z, share), upstream.to(exact.dtype))
    assert (to_z.dtype, to_lam.dtype) == (dtype, acc)
    stored = torch.finfo(dtype).eps if dtype != acc else 1e-5
    if exact.isnan().any():  # nothing counts
        assert (to_z == 0).all()
    else:
        torch.testing.assert_close(to_z.double(), exact_to_z, rtol=stored, atol=2e-5)
        torch.testing.assert_close(to_lam.double(), exact_to_lam, rtol=1e-4, atol=1e-4)


@every_backend
@pytest.mark.parametrize("lam", [1.0, 0.0])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_nothing_mixed_is_cross_entropy(backend, lam, label_smoothing, reduction, ignored):
    """λ 1 for the own classes, 0 for the partners'; where all rows are ignored its NaN, with a gradient of 0."""
    logits, weight = random_batch((6, 5), torch.float32), torch.tensor([0.5, 2.0, 1.0, 0.0, 3.0])
    target = torch.tensor([0, 1, 2, 3, 4, 0])
    target[{"none": [], "some": [1, 4], "all": list(range(6))}[ignored]] = -100
    permutation = random_permutation(6)
    for class_weight in (None, weight):
        options = {"weight": class_weight, "label_smoothing": label_smoothing, "reduction": reduction}
        results = []
        for loss in (
            lambda z, options=options: F.cross_entropy(
                z, target if lam == 1 else target[permutation], **options
            ),
            lambda z, options=options: mixup_cross_entropy(
                z, target, permutation, lam, backend=backend, **options
            ),
        ):
            z = logits.clone().requires_grad_()
            value = loss(z)
            value.sum().backward()
            results.append((value.detach(), z.grad))
        torch.testing.assert_close(results[1], results[0], equal_nan=True)


@every_backend
@every_dtype
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_infinite_or_nan_counts_only_with_a_weight(backend, dtype, label_smoothing, weighted):
    """An ignored row may hold anything, a class of weight 0 -inf."""
    logits = random_batch((4, 40), dtype)
    logits[0] = torch.nan
    logits[1, 7] = torch.inf
    weight = torch.ones(40)
    if weighted:
        weight[5] = 0
        logits[2:, 5] = -torch.inf
    target, partner = torch.tensor([-100, -100, 3, 5]), torch.tensor([-100, -100, -100, 4])
    logits.requires_grad_()
    options = {"weight": weight if weighted else None, "label_smoothing": label_smoothing, "backend": backend}
    losses = mixup_cross_entropy(logits, target, lam=0.3, partner_target=partner, reduction="none", **options)
    assert (losses[:2] == 0).all() and losses.isfinite().all()
    losses.sum().backward()
    assert (logits.grad[:2] == 0).all() and logits.grad.isfinite().all()
    assert (logits.grad[2:].abs().sum(1) > 0).all()


@every_backend
def test_weights_and_ignored_classes_gradcheck(backend):
    logits = random_batch((5, 4), torch.float64).requires_grad_()
    lam = torch.tensor([0.2, 0.9, 0.1, 0.7, 0.4], dtype=torch.float64, requires_grad=True)
    target, permutation = torch.tensor([0, -100, 3, 1, -100]), torch.tensor([2, 0, 1, 3, 4])
    for weight in (None, torch.tensor([0.5, 2.0, 0.0, 1.5], dtype=torch.float64)):
        for reduction in ("mean", "sum", "none"):

            def run(logits, lam, weight=weight, reduction=reduction):
                options = {"label_smoothing": 0.1, "reduction": reduction, "backend": backend}
                return mixup_cross_entropy(logits, target, permutation, lam, weight=weight, **options)

            assert torch.autograd.gradcheck(run, (logits, lam))
            assert torch.autograd.gradgradcheck(run, (logits, lam))


@every_backend
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_classes_of_any_integer_dtype(backend, dtype):
    logits, target, permutation = (
        random_batch((6, 5), torch.float32),
        torch.arange(6) % 5,
        random_permutation(6),
    )
    expected = mixup_cross_entropy(logits, target, permutation, 0.3, backend=backend)
    narrow = target.to(dtype)
    assert mixup_cross_entropy(logits, narrow, permutation, 0.3, backend=backend) == expected
    direct = {"lam": 0.3, "partner_target": narrow[permutation], "backend": backend}
    assert mixup_cross_entropy(logits, narrow, **direct) == expected


def test_the_ignored_class_of_a_narrow_dtype():
    logits, target = random_batch((3, 5), torch.float32), torch.tensor([0, 255, 4], dtype=torch.uint8)
    found = mixup_cross_entropy(logits, target, torch.arange(3), 1.0, ignore_index=255)
    torch.testing.assert_close(found, F.cross_entropy(logits, target.long(), ignore_index=255))


@every_backend
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_logits_of_pixels(backend, layout):
    logits, _ = in_layout(random_batch((4, 6, 5, 3), torch.float32), layout)
    target, lam = classes_of((4, 5, 3), 6, 255), shares_of(4)
    permutation, weight = random_permutation(4), torch.rand(6)
    logits.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        options = {"weight": weight, "ignore_index": 255, "label_smoothing": 0.1, "reduction": reduction}
        exact = terms_apart(logits, target, target[permutation], lam, **options)
        (exact_grad,) = torch.autograd.grad(exact.sum(), logits)
        for partner in ({"permutation": permutation}, {"partner_target": target[permutation]}):
            found = mixup_cross_entropy(logits, target, lam=lam, backend=backend, **partner, **options)
            torch.testing.assert_close(found, exact)
            torch.testing.assert_close(torch.autograd.grad(found.sum(), logits)[0], exact_grad)


@every_backend
@pytest.mark.parametrize("weighted", [False, True])
def test_parts_of_a_batch_add_up_to_it(backend, weighted):
    """Gradient accumulation: partners lie outside of the part, so that their classes are passed."""
    model = torch.nn.Linear(7, 5)
    x, target = random_batch((12, 7), torch.float32), torch.arange(12) % 5
    permutation, lam = random_permutation(12), shares_of(12)
    weight = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0]) if weighted else None
    if weighted:
        target[3:6] = -100
    partner, options = target[permutation], {"weight": weight, "label_smoothing": 0.1, "backend": backend}
    whole = mixup_cross_entropy(model(x), target, permutation, lam, **options)
    exact = torch.autograd.grad(whole, list(model.parameters()))
    denominator = 12
    if weighted:
        of_class = torch.cat([weight, torch.zeros(1)])
        own, other = (of_class[t.masked_fill(t == -100, 5)] for t in (target, partner))
        denominator = (lam * own + (1 - lam) * other).sum()
    total = 0
    for rows in torch.arange(12).split(5):
        part = {"lam": lam[rows], "partner_target": partner[rows], "reduction": "sum", **options}
        loss = mixup_cross_entropy(model(x[rows]), target[rows], **part) / denominator
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach())
    for parameter, grad in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


BAD = [
    (
        {"logits": torch.randn(4)},
        ValueError,
        r"logits must have shape \(N, C\) or \(N, C, d1, ...\), got \(4,\)",
    ),
    ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "logits must be float64, float32"),
    ({"target": torch.tensor([0, 1, 2, 3])}, ValueError, r"target must be in \[0, 3\), got 3"),
    ({"target": torch.tensor([0, 1, 2, -1])}, ValueError, r"target must be in \[0, 3\), got -1"),
    ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target must have shape \(4,\), got \(3,\)"),
    ({"target": torch.zeros(4)}, TypeError, "target must hold classes of an integer dtype, got float32"),
    ({"permutation": torch.tensor([0, 0, 1, 2])}, ValueError, "permutation must hold each of 0 to 3 once"),
    ({"lam": torch.tensor([0.5, 0.5, 0.5, 1.5])}, ValueError, r"lam must be in \[0, 1\], got 1.5"),
    (
        {"target": torch.tensor([0, 1, 2, 2**62])},
        ValueError,
        r"target must be in \[0, 3\), got 4611686018427387904",
    ),
    ({"target": None}, TypeError, "target must be a tensor, got NoneType"),
    ({"target": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, r"target must have shape \(4,\)"),
    ({"logits": torch.randn(4, 0)}, ValueError, r"logits must have shape \(B, ...\) with no dimension of 0"),
    ({"logits": torch.ones(4, 3).to_sparse()}, TypeError, "logits must be a dense tensor"),
    ({"lam": float("nan")}, ValueError, r"lam must be in \[0, 1\], got nan"),
    ({"label_smoothing": float("nan")}, ValueError, r"label_smoothing must be in \[0, 1\], got nan"),
    ({"label_smoothing": None}, TypeError, "label_smoothing must be a number, got NoneType"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
    (
        {"target": torch.zeros(4, dtype=torch.bool)},
        TypeError,
        "target must hold classes of an integer dtype, got bool",
    ),
    ({"permutation": None}, ValueError, "permutation or partner_target must be given, got neither"),
    (
        {"partner_target": torch.zeros(4, dtype=torch.int64)},
        ValueError,
        "permutation or partner_target must be given, got both",
    ),
    (
        {"permutation": None, "partner_target": torch.tensor([0, 0, 3, 0])},
        ValueError,
        r"partner_target must be in \[0, 3\), got 3",
    ),
    (
        {"permutation": None, "partner_target": torch.zeros(3, dtype=torch.int64)},
        ValueError,
        r"partner_target must have shape \(4,\)",
    ),
    ({"lam": None}, TypeError, "lam must be a number, got NoneType"),
    (
        {"ignore_index": -1, "target": torch.tensor([-100, 0, -1, 0])},
        ValueError,
        r"target must be in \[0, 3\), got -100",
    ),
    ({"ignore_index": None}, TypeError, "ignore_index must be an integer, got NoneType"),
    ({"ignore_index": True}, TypeError, "ignore_index must be an integer, got bool"),
    ({"weight": [1.0] * 3}, TypeError, "weight must be a tensor, got list"),
    ({"weight": torch.ones(3, dtype=torch.int64)}, TypeError, "weight must be a floating tensor, got int64"),
    ({"weight": torch.ones(4)}, ValueError, r"weight must have shape \(3,\), got \(4,\)"),
    ({"weight": torch.ones(3, requires_grad=True)}, ValueError, "weight must not require grad"),
    ({"weight": torch.ones(3, device="meta")}, ValueError, "weight must be on cpu as logits is, got meta"),
    (
        {
            "logits": torch.randn(4, 3, 2),
            "target": torch.zeros(4, 2, dtype=int),
            "permutation": torch.tensor([0, 1, 2, 2]),
        },
        ValueError,
        "permutation must hold each of 0 to 3 once",
    ),
    ({"reduction": "max"}, ValueError, 'reduction must be "mean", "sum" or "none"'),
]


@every_backend
@pytest.mark.parametrize("wrong, error, message", BAD)
def test_bad_input_raises(backend, wrong, error, message):
    arguments = {
        "logits": torch.randn(4, 3),
        "target": torch.tensor([0, 1, 2, 0]),
        "permutation": torch.arange(4),
        "lam": 0.5,
    }
    with pytest.raises(error, match=f"^mixup_cross_entropy: {message}"):
        mixup_cross_entropy(**(arguments | wrong), backend=backend)


@every_operator
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_opcheck(backend, reduction):
    target, permutation, lam = torch.tensor([0, 1, 2, -100, 4]), random_permutation(5), shares_of(5)
    ops = torch.ops.ssl_kernels
    forward, backward = (getattr(getattr(ops, f"mixup_cross_entropy_{d}"), backend) for d in ("fwd", "bwd"))
    for logits in (random_batch((5, 9), torch.float32), random_batch((9, 5), torch.bfloat16).T):
        for weight in (None, torch.rand(9)):
            operands, options = (logits, target, permutation, lam, weight), (0.1, -100, False)
            torch.library.opcheck(forward, (*operands, *options, reduction))
            _, lse, _ = forward(*operands, *options, reduction)
            torch.library.opcheck(backward, (torch.ones_like(lse), *operands, lse, *options))


@pytest.mark.filterwarnings("ignore")
@every_operator
def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    target, permutation = torch.arange(6), random_permutation(6)

    def run(logits, lam):
        return mixup_cross_entropy(logits, target, permutation, lam, label_smoothing=0.1, backend=backend)

    def weighted(logits, lam):
        partner = target[permutation].masked_fill(target == 2, 255)
        options = {"partner_target": partner, "weight": weight, "ignore_index": 255, "backend": backend}
        return mixup_cross_entropy(logits, target.to(torch.uint8), lam=lam, label_smoothing=0.1, **options)

    weight = torch.rand(9)
    logits, lam = random_batch((6, 9), torch.float32).requires_grad_(), shares_of(6).requires_grad_()
    for plain in (run, weighted):
        results = []
        for function in (plain, torch.compile(plain, fullgraph=True, backend="aot_eager")):
            loss = function(logits, lam)
            results.append((loss, *torch.autograd.grad(loss, (logits, lam))))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)


def test_backends_are_listed():
    found = ssl_kernels.backends_for(mixup_cross_entropy, torch.randn(4, 3))
    assert [name for name, reason in found.items() if reason is None] == ["native", "chunked", "reference"]
