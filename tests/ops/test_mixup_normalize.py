"""`mixup_normalize` on every backend of the CPU, against float64 by definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ssl_kernels
from ssl_kernels import mixup_normalize
from tests.helpers import BACKENDS, OPERATORS
from tests.support.mixing import (
    LAYOUTS,
    check_mixup_normalize,
    in_layout,
    random_batch,
    random_permutation,
    shares_of,
    statistics,
)

RESULT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_operator = pytest.mark.parametrize("backend", OPERATORS)


def check(backend, x, lam, permutation, dtype):
    mean, std = statistics(x.shape[1])
    found = mixup_normalize(x, lam, permutation, mean, std, dtype, backend=backend)
    assert found.stride() == torch.empty_like(x, dtype=dtype).stride()
    check_mixup_normalize(found, x, lam, permutation, mean, std, dtype)


@every_backend
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 19), st.integers(1, 19)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(RESULT_DTYPES),
    seed=st.integers(0, 1000),
)
def test_matches_float64(backend, shape, layout, dtype, seed):
    x, _ = in_layout(random_batch(shape, torch.uint8, seed) * 2, layout)
    check(backend, x, shares_of(shape[0], seed=seed), random_permutation(shape[0], seed), dtype)


@every_operator
@pytest.mark.parametrize("dtype", RESULT_DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rotated", "every_other_sample"])
def test_matches_float64_across_chunks(backend, dtype, layout):
    x, _ = in_layout(random_batch((3, 3, 91, 73), torch.uint8), layout)
    check(backend, x, shares_of(3), torch.tensor([1, 2, 0]), dtype)


@every_backend
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 70])
def test_any_number_of_channels(backend, channels):
    for layout in ("contiguous", "channels_last"):
        x, _ = in_layout(random_batch((4, channels, 7, 6), torch.uint8), layout)
        check(backend, x, shares_of(4), random_permutation(4), torch.float32)


@every_backend
def test_all_bytes(backend):
    x = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    found = mixup_normalize(x, 1.0, torch.arange(1), [0.5], [0.25], backend=backend)
    expected = (torch.arange(256, dtype=torch.float64) / 255 - 0.5) / 0.25
    torch.testing.assert_close(found.flatten().double(), expected, rtol=0, atol=1e-6)


def test_does_not_change_its_input():
    x = random_batch((4, 3, 5, 6), torch.uint8)
    before = x.clone()
    mixup_normalize(x, 0.3, random_permutation(4), [0.5] * 3, [0.2] * 3)
    assert torch.equal(x, before)


BAD = [
    ({"x": torch.randn(4, 3, 2, 2)}, TypeError, "x must be uint8, got float32"),
    ({"x": torch.zeros(4, 3, 2, dtype=torch.uint8)}, ValueError, r"x must have shape \(B, C, H, W\)"),
    ({"x": torch.zeros(0, 3, 2, 2, dtype=torch.uint8)}, ValueError, r"x must have shape \(B, C, H, W\)"),
    ({"dtype": torch.int32}, TypeError, "dtype must be float32, float16 or bfloat16, got torch.int32"),
    ({"mean": [0.5]}, ValueError, "mean must have 3 numbers, got 1"),
    ({"std": [0.5, 0.0, 1.0]}, ValueError, "std must be finite and > 0, got"),
    ({"std": torch.ones(2)}, ValueError, r"std must have 3 numbers, got shape \(2,\)"),
    ({"mean": [float("nan")] * 3}, ValueError, "mean must be finite, got"),
    ({"mean": [1e300] * 3}, ValueError, "mean must be finite, got"),
    ({"mean": None}, TypeError, "mean must be a tensor or a sequence of numbers, got None"),
    ({"mean": 0.5}, TypeError, "mean must be a tensor or a sequence of numbers, got 0.5"),
    ({"mean": "abc"}, TypeError, "mean must be a tensor or a sequence of numbers, got 'abc'"),
    (
        {"mean": torch.ones(3, dtype=torch.complex64)},
        TypeError,
        "mean must be a floating tensor, got complex64",
    ),
    ({"mean": torch.ones(3).to_sparse()}, TypeError, "mean must be a dense tensor"),
    ({"mean": torch.ones(3, device="meta")}, ValueError, "mean must be on cpu as x is, got meta"),
    ({"std": [1e-60] * 3}, ValueError, "std must be finite and > 0, got"),
    ({"std": torch.tensor([0.5, 0.0, 0.5])}, ValueError, "std must be finite and > 0, got"),
    ({"std": torch.tensor([0.5, float("nan"), 0.5])}, ValueError, "std must be finite and > 0, got"),
    ({"x": torch.zeros(4, 3, 2, 2, dtype=torch.uint8).to_sparse()}, TypeError, "x must be a dense tensor"),
    ({"lam": float("nan")}, ValueError, r"lam must be in \[0, 1\], got nan"),
    ({"permutation": torch.arange(4).int()}, TypeError, "permutation must be int64, got int32"),
    ({"dtype": torch.float64}, TypeError, "dtype must be float32, float16 or bfloat16"),
    ({"lam": 2.0}, ValueError, r"lam must be in \[0, 1\], got 2.0"),
    ({"lam": torch.tensor([0.5, 0.5, -1.0, 0.5])}, ValueError, r"lam must be in \[0, 1\], got -1"),
    ({"permutation": torch.tensor([0, 0, 1, 2])}, ValueError, "permutation must hold each of 0 to 3 once"),
]


@every_backend
@pytest.mark.parametrize("wrong, error, message", BAD)
def test_bad_input_raises(backend, wrong, error, message):
    arguments = {
        "x": torch.zeros(4, 3, 2, 2, dtype=torch.uint8),
        "lam": 0.5,
        "permutation": torch.arange(4),
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
    }
    with pytest.raises(error, match=f"^mixup_normalize: {message}"):
        mixup_normalize(**(arguments | wrong), backend=backend)


@every_operator
def test_opcheck(backend):
    x = random_batch((5, 3, 4, 6), torch.uint8)
    operator = getattr(torch.ops.ssl_kernels.mixup_normalize, backend)
    for images in (x, x.contiguous(memory_format=torch.channels_last), x[::2, :, ::2]):
        batch = len(images)
        arguments = (images, shares_of(batch), random_permutation(batch), *statistics(3), torch.bfloat16)
        torch.library.opcheck(operator, arguments)


@pytest.mark.filterwarnings("ignore")
@every_operator
def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    x, permutation = random_batch((5, 3, 4, 6), torch.uint8), random_permutation(5)

    def run(x):
        return mixup_normalize(x, 0.3, permutation, [0.5] * 3, [0.2] * 3, torch.float16, backend=backend)

    found = torch.compile(run, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(found, run(x))


def test_backends_are_listed():
    found = ssl_kernels.backends_for(mixup_normalize, torch.zeros(1, 1, 1, 1, dtype=torch.uint8))
    assert [name for name, reason in found.items() if reason is None] == ["native", "chunked", "reference"]
