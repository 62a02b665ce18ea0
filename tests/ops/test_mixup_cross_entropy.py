"""`mixup_cross_entropy` on every backend of the CPU, against `F.cross_entropy` with dense targets in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import ssl_kernels
from ssl_kernels import mixup_cross_entropy
from tests.helpers import saved_bytes
from tests.ops.mixing_calls import (
    BACKENDS,
    DTYPES,
    OPERATORS,
    accumulation,
    in_layout,
    random_batch,
    random_lam,
    random_permutation,
)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_operator = pytest.mark.parametrize("backend", OPERATORS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def dense_target(target, permutation, lam, classes):
    one_hot = F.one_hot(target, classes).double()
    share = lam.double()[:, None]
    return share * one_hot + (1 - share) * one_hot[permutation]


def truth(logits, target, permutation, lam, label_smoothing):
    """(losses, gradient by logits and by lam of their weighted sum), float64."""
    z, lam = logits.detach().double().requires_grad_(), lam.detach().double().requires_grad_()
    dense = dense_target(target, permutation, lam, z.shape[1])
    losses = F.cross_entropy(z, dense, reduction="none", label_smoothing=label_smoothing)
    return (losses.detach(), *torch.autograd.grad(losses, (z, lam), row_weights(len(z))))


def row_weights(n):
    return torch.linspace(-1, 2, n, dtype=torch.float64)


def check(backend, logits, target, permutation, lam, label_smoothing):
    losses, grad_logits, grad_lam = truth(logits, target, permutation, lam, label_smoothing)
    z, lam = logits.detach().requires_grad_(), lam.detach().requires_grad_()
    found = mixup_cross_entropy(
        z, target, permutation, lam, label_smoothing=label_smoothing, reduction="none", backend=backend
    )
    to_z, to_lam = torch.autograd.grad(found, (z, lam), row_weights(len(z)).to(found.dtype))
    acc = accumulation(logits.dtype)
    assert (found.dtype, to_z.dtype, to_lam.dtype) == (acc, logits.dtype, acc)
    eps = torch.finfo(acc).eps
    largest = 1 + logits.double().abs().amax(1)
    assert ((found.double() - losses).abs() <= 8 * eps * largest).all()
    assert ((to_lam.double() - grad_lam).abs() <= 8 * eps * largest * row_weights(len(z)).abs()).all()
    stored = 0 if logits.dtype == acc else torch.finfo(logits.dtype).eps / 2 * 1.001
    allowed = stored * grad_logits.abs() + 8 * eps * (largest * row_weights(len(z)).abs())[:, None]
    assert ((to_z.double() - grad_logits).abs() <= allowed + torch.finfo(logits.dtype).tiny).all()


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
    lam, permutation = random_lam(n, dtype, seed), random_permutation(n, seed)
    check(backend, logits, target, permutation, lam, label_smoothing)


@every_operator
@every_dtype
@pytest.mark.parametrize("n, classes", [(300, 1000), (3, 40000)])
def test_matches_float64_at_usual_sizes(backend, dtype, n, classes):
    logits = 3 * random_batch((n, classes), dtype)
    target = torch.arange(n) % classes
    check(backend, logits, target, random_permutation(n), random_lam(n, dtype), 0.1)


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
    check(backend, logits, torch.arange(6), random_permutation(6), random_lam(6), 0.1)


def test_no_dense_target_is_saved():
    logits = torch.randn(64, 1000, requires_grad=True)
    saved = saved_bytes(
        mixup_cross_entropy, logits, torch.arange(64), random_permutation(64), 0.3, backend="native"
    )
    assert saved <= logits.nbytes + 64 * 64


BAD = [
    ({"logits": torch.randn(4)}, ValueError, r"logits must have shape \(N, C\), got \(4,\)"),
    ({"logits": torch.zeros(4, 3, dtype=torch.int64)}, TypeError, "logits must be float64, float32"),
    ({"target": torch.tensor([0, 1, 2, 3])}, ValueError, "target must be in 0 to 2, got 3"),
    ({"target": torch.tensor([0, 1, 2, -1])}, ValueError, "target must be in 0 to 2, got -1"),
    ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, r"target must have shape \(4,\), got \(3,\)"),
    ({"target": torch.zeros(4)}, TypeError, "target must be int64, got float32"),
    ({"permutation": torch.tensor([0, 0, 1, 2])}, ValueError, "permutation must hold each of 0 to 3 once"),
    ({"lam": torch.tensor([0.5, 0.5, 0.5, 1.5])}, ValueError, r"lam must be in \[0, 1\], got 1.5"),
    (
        {"target": torch.tensor([0, 1, 2, 2**62])},
        ValueError,
        "target must be in 0 to 2, got 4611686018427387904",
    ),
    ({"target": None}, TypeError, "target must be a tensor, got NoneType"),
    ({"target": torch.zeros(4, 1, dtype=torch.int64)}, ValueError, r"target must have shape \(4,\)"),
    ({"logits": torch.randn(4, 0)}, ValueError, r"logits must have shape \(B, ...\), nothing of it 0"),
    ({"logits": torch.ones(4, 3).to_sparse()}, TypeError, "logits must be a dense tensor"),
    ({"lam": float("nan")}, ValueError, r"lam must be in \[0, 1\], got nan"),
    ({"label_smoothing": float("nan")}, ValueError, r"label_smoothing must be in \[0, 1\], got nan"),
    ({"label_smoothing": None}, TypeError, "label_smoothing must be a number, got NoneType"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\], got 1.5"),
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
def test_opcheck(backend):
    target, permutation, lam = torch.tensor([0, 1, 2, 0, 4]), random_permutation(5), random_lam(5)
    ops = torch.ops.ssl_kernels
    for logits in (random_batch((5, 9), torch.float32), random_batch((9, 5), torch.bfloat16).T):
        operands = (logits, target, permutation, lam)
        forward, backward = (getattr(ops, f"mixup_cross_entropy_{d}") for d in ("fwd", "bwd"))
        torch.library.opcheck(getattr(forward, backend), (*operands, 0.1))
        loss, lse = getattr(forward, backend)(*operands, 0.1)
        torch.library.opcheck(getattr(backward, backend), (torch.ones_like(loss), *operands, lse, 0.1))


@pytest.mark.filterwarnings("ignore")
@every_operator
def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    target, permutation = torch.arange(6), random_permutation(6)

    def run(logits, lam):
        return mixup_cross_entropy(logits, target, permutation, lam, label_smoothing=0.1, backend=backend)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    logits, lam = random_batch((6, 9), torch.float32).requires_grad_(), random_lam(6).requires_grad_()
    results = []
    for function in (run, compiled):
        loss = function(logits, lam)
        results.append((loss, *torch.autograd.grad(loss, (logits, lam))))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_backends_are_listed():
    found = ssl_kernels.backends_for(mixup_cross_entropy, torch.randn(4, 3))
    assert [name for name, reason in found.items() if reason is None] == ["native", "chunked", "reference"]
