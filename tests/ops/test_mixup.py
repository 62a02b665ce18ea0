"""`mixup_`, `mixup` and its gradients on every backend of the CPU, against float64 by definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ssl_kernels
from ssl_kernels import _C, mixup, mixup_
from tests.helpers import BACKENDS, DTYPES, OPERATORS, run_python, same_bits
from tests.support.mixing import (
    LAYOUTS,
    PERMUTATIONS,
    accumulation,
    calls,
    check_mixup,
    check_mixup_gradients,
    check_rounded_once,
    in_layout,
    mixup_definition,
    permutation_of,
    random_batch,
    random_permutation,
    shares_of,
    untouched_outside,
)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_operator = pytest.mark.parametrize("backend", OPERATORS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def check(backend, x, lam, permutation):
    """In place and out of place."""
    before = x.clone()
    new = mixup(x, lam, permutation, backend=backend)
    assert backend == "reference" or new.stride() == torch.empty_like(x).stride()
    assert mixup_(x, lam, permutation, backend=backend) is x
    for found in (new, x):
        check_mixup(found, before, lam, permutation)


@every_backend
@given(calls(), st.sampled_from(DTYPES))
def test_matches_float64(backend, call, dtype):
    shape, layout, seed = call
    x, memory = in_layout(random_batch(shape, dtype, seed), layout)
    check(backend, x, shares_of(shape[0], dtype, seed), random_permutation(shape[0], seed))
    assert untouched_outside(x, memory)


@every_operator
@every_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_matches_float64_across_chunks(backend, dtype, layout):
    """More elements a sample than a chunk holds, and no whole number of vectors."""
    x, memory = in_layout(random_batch((5, 3, 67, 61), dtype), layout)
    check(backend, x, shares_of(5, dtype), torch.tensor([3, 0, 2, 4, 1]))
    assert untouched_outside(x, memory)


@every_backend
@pytest.mark.parametrize("batch", [1, 2, 7, 64, 301])
def test_any_permutation(backend, batch):
    for kind in (*PERMUTATIONS, "pairs"):
        permutation = permutation_of(kind, batch)
        check(backend, random_batch((batch, 37), torch.float32), shares_of(batch), permutation)


@every_backend
@every_dtype
def test_what_has_no_weight_counts_nothing(backend, dtype):
    """λ = 1 and fixed points leave a sample bit for bit, λ = 0 gives the partner's, whatever the other holds."""
    x = random_batch((6, 130), dtype)
    x[1], x[3, 5] = torch.inf, torch.nan
    before = x.clone()
    permutation = torch.tensor([1, 0, 3, 2, 4, 5])
    lam = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.3, 1.0]).to(accumulation(dtype))
    mixup_(x, lam, permutation, backend=backend)
    assert same_bits(x[[0, 1, 2, 3, 4, 5]], before[[0, 0, 2, 2, 4, 5]])
    new = mixup(before, lam, permutation, backend=backend)
    assert same_bits(new, x)


@every_backend
def test_infinities_and_nan_propagate(backend):
    x = random_batch((3, 40), torch.float32)
    x[1, 7], x[1, 8] = torch.inf, torch.nan
    mixed = mixup(x, 0.5, torch.tensor([1, 2, 0]), backend=backend)
    assert mixed[0, 7] == mixed[1, 7] == torch.inf
    assert mixed[0, 8].isnan() and mixed[1, 8].isnan()
    assert mixed.isfinite().sum() == mixed.numel() - 4


@pytest.mark.parametrize("lam", [0.25, torch.tensor(0.25), torch.tensor([0.25] * 4).double()], ids=str)
def test_lam_is_a_number_or_one_a_sample(lam):
    x, permutation = random_batch((4, 9), torch.float32), torch.tensor([1, 2, 3, 0])
    expected = 0.25 * x + 0.75 * x[permutation]
    torch.testing.assert_close(mixup(x, lam, permutation), expected)


@every_backend
@every_dtype
@given(calls(most_dims=4), st.booleans())
def test_gradients_match_float64(backend, dtype, call, same_layout):
    shape, layout, seed = call
    x, _ = in_layout(random_batch(shape, dtype, seed), layout)
    lam = shares_of(shape[0], dtype, seed).requires_grad_()
    permutation = random_permutation(shape[0], seed)
    grad = random_batch(shape, dtype, seed + 1)
    if same_layout:
        grad, _ = in_layout(grad, layout)
    mixed = mixup(x.requires_grad_(), lam, permutation, backend=backend)
    grad_x, grad_lam = torch.autograd.grad(mixed, (x, lam), grad)

    check_mixup_gradients(grad_x, grad_lam, grad, x, lam, permutation)


@every_backend
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)])
def test_gradcheck(backend, needed):
    x = random_batch((5, 2, 3), torch.float64).requires_grad_(needed[0])
    lam = torch.tensor([0.2, 1.0, 0.0, 0.7, 0.4], dtype=torch.float64)
    if needed[1]:  # not at the ends, where it cannot be moved either way
        lam = lam.clamp(0.1, 0.9).requires_grad_()
    permutation = torch.tensor([2, 0, 1, 3, 4])

    def run(x, lam):
        return mixup(x, lam, permutation, backend=backend)

    assert torch.autograd.gradcheck(run, (x, lam))
    assert torch.autograd.gradgradcheck(run, (x, lam))


@every_operator
def test_gradient_of_lam_at_its_ends(backend):
    """As by the formula, though the partner counts nothing in the value there."""
    x = random_batch((3, 8), torch.float64)
    lam = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    permutation = torch.tensor([1, 2, 0])
    mixup(x, lam, permutation, backend=backend).sum().backward()
    torch.testing.assert_close(lam.grad, (x - x[permutation]).sum(1))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_same_bits_for_any_number_of_threads(set_threads, threads):
    x, grad = random_batch((9, 3, 50, 70), torch.float32), random_batch((9, 3, 50, 70), torch.float32, 1)
    lam, permutation = shares_of(9), random_permutation(9)
    run = torch.ops.ssl_kernels.mixup_bwd.native
    set_threads(3)
    expected = (mixup(x, lam, permutation), *run(grad, x, lam, permutation, True))
    set_threads(threads)
    found = (mixup(x, lam, permutation), *run(grad, x, lam, permutation, True))
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


SAVE_RESULTS = """
import sys, torch
from ssl_kernels import _C
from tests.ops.test_mixup import instruction_set_results
assert _C.build_info()["cpu_instruction_set"] == sys.argv[1]
torch.save(instruction_set_results(), sys.argv[2])
"""


def instruction_set_results():
    results = []
    for dtype in DTYPES:
        x, lam = random_batch((5, 301), dtype), shares_of(5, dtype).clamp(0.1, 0.9)
        results.append(
            (mixup(x, lam, random_permutation(5)), *mixup_definition(x, lam, random_permutation(5)))
        )
        logits = 5 * random_batch((7, 133), dtype)
        results.append((ssl_kernels.mixup_cross_entropy(
            logits, torch.arange(7), random_permutation(7), 0.3, reduction="none", label_smoothing=0.1
        ),))  # fmt: skip
    images = random_batch((5, 3, 7, 11), torch.uint8)
    for dtype in DTYPES[1:]:
        normalized = ssl_kernels.mixup_normalize(
            images, 0.3, random_permutation(5), [0.5] * 3, [0.2] * 3, dtype
        )
        results.append((normalized.float(),))
    return results


def test_instruction_sets_agree(tmp_path):
    for name in _C.build_info()["cpu_instruction_sets"]:
        run_python(SAVE_RESULTS, name, str(tmp_path / name), SSL_KERNELS_CPU=name)
        for found, expected in zip(torch.load(tmp_path / name), instruction_set_results(), strict=True):
            if len(found) == 3:
                check_rounded_once(*found)
            else:
                torch.testing.assert_close(found[0], expected[0], rtol=1e-2, atol=1e-5)


def test_allocates_nothing_of_the_batch():
    """In place on the CPU: a few chunks, seen as memory that the allocator hands out."""
    x = torch.randn(64, 3, 64, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        mixup_(x, 0.3, random_permutation(64))
    assert (
        max(event.self_device_memory_usage + event.self_cpu_memory_usage for event in profile.events()) < 1e4
    )


@every_operator
def test_overwritten_tensor_is_noticed_by_autograd(backend):
    weight = torch.randn(4, 3, requires_grad=True)
    squares = (weight * weight).exp()
    loss = (squares * squares).sum()
    mixup_(squares.detach(), 0.5, torch.tensor([1, 0, 2, 3]), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_backend
def test_in_place_on_what_autograd_tracks_is_an_error(backend):
    for x in (torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True) * 2):
        with pytest.raises(ValueError, match=r"^mixup_: x must not require grad"):
            mixup_(x, 0.5, torch.arange(4), backend=backend)
        with torch.no_grad():
            mixup_(x, 0.5, torch.arange(4), backend=backend)
    with pytest.raises(ValueError, match=r"^mixup_: lam must not require grad"):
        mixup_(torch.randn(4, 3), torch.tensor(0.5, requires_grad=True), torch.arange(4), backend=backend)


BAD_VALUES = [
    ({"permutation": torch.tensor([0, 1, 1, 2])}, "permutation must hold each of 0 to 3 once"),
    ({"permutation": torch.tensor([0, 1, 2, 4])}, "permutation must hold each of 0 to 3 once"),
    ({"permutation": torch.tensor([0, 1, 2, -1])}, "permutation must hold each of 0 to 3 once"),
    ({"lam": -0.1}, r"lam must be in \[0, 1\], got -0.1"),
    ({"lam": 1.5}, r"lam must be in \[0, 1\], got 1.5"),
    ({"lam": float("nan")}, r"lam must be in \[0, 1\], got nan"),
    ({"lam": torch.tensor([0.5, 0.5, 0.5, 1.5])}, r"lam must be in \[0, 1\], got 1.5"),
    ({"lam": torch.tensor([0.5, float("nan"), 0.5, 0.5])}, r"lam must be in \[0, 1\], got nan"),
    ({"lam": torch.tensor([0.5, 0.5])}, r"lam must be a number or have shape \(4,\), got \(2,\)"),
    ({"lam": float("inf")}, r"lam must be in \[0, 1\], got inf"),
    # Just outside, which rounding to the dtype of the shares would hide.
    ({"lam": torch.full((4,), 1 + 1e-12, dtype=torch.float64)}, r"lam must be in \[0, 1\], got 1"),
    ({"lam": torch.full((4,), -1e-60, dtype=torch.float64)}, r"lam must be in \[0, 1\], got -1e-60"),
    ({"lam": torch.ones(4, 1)}, r"lam must be a number or have shape \(4,\), got \(4, 1\)"),
    ({"permutation": torch.tensor([0, 1, 2, 2**62])}, "permutation must hold each of 0 to 3 once"),
    ({"permutation": torch.tensor([0, 1, 2, -(2**63)])}, "permutation must hold each of 0 to 3 once"),
    (
        {"permutation": torch.zeros(1, dtype=torch.int64).expand(4)},
        "permutation must hold each of 0 to 3 once",
    ),
    ({"permutation": torch.arange(4)[:, None]}, r"permutation must have shape \(4,\), got \(4, 1\)"),
    ({"permutation": torch.arange(3)}, r"permutation must have shape \(4,\), got \(3,\)"),
    ({"x": torch.randn(0, 3)}, r"x must have shape \(B, ...\) with no dimension of 0, got \(0, 3\)"),
    ({"x": torch.tensor(1.0)}, r"x must have shape \(B, ...\) with no dimension of 0, got \(\)"),
    ({"permutation": torch.arange(4, device="meta")}, "permutation must be on cpu as x is, got meta"),
    ({"lam": torch.ones(4, device="meta")}, "lam must be on cpu as x is, got meta"),
]
BAD_TYPES = [
    ({"x": [1.0]}, "x must be a tensor, got list"),
    (
        {"x": torch.ones(4, 3, dtype=torch.int64)},
        "x must be float64, float32, float16 or bfloat16, got int64",
    ),
    ({"permutation": [0, 1, 2, 3]}, "permutation must be a tensor, got list"),
    ({"permutation": torch.ones(4)}, "permutation must be int64, got float32"),
    ({"lam": "half"}, "lam must be a number, got str"),
    ({"lam": True}, "lam must be a number, got bool"),
    ({"lam": torch.ones(4, dtype=torch.int64)}, "lam must be a floating tensor, got int64"),
    ({"lam": torch.ones(4, dtype=torch.complex64)}, "lam must be a floating tensor, got complex64"),
    ({"lam": None}, "lam must be a number, got NoneType"),
    ({"lam": [0.5] * 4}, "lam must be a number, got list"),
    ({"lam": torch.ones(4).to_sparse()}, "lam must be a dense tensor, got a sparse_coo one"),
    ({"x": torch.ones(4, 3).to_sparse()}, "x must be a dense tensor, got a sparse_coo one"),
    ({"x": torch.ones(4, 3).to_sparse_csr()}, "x must be a dense tensor, got a sparse_csr one"),
    ({"x": torch.ones(4, 3) + 0j}, "x must be float64, float32, float16 or bfloat16, got complex64"),
    ({"permutation": torch.arange(4, dtype=torch.int32)}, "permutation must be int64, got int32"),
    (
        {"permutation": torch.arange(4).to_sparse()},
        "permutation must be a dense tensor, got a sparse_coo one",
    ),
]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@every_backend
@pytest.mark.parametrize("function", [mixup, mixup_], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "wrong, message, error",
    [(*case, ValueError) for case in BAD_VALUES] + [(*case, TypeError) for case in BAD_TYPES],
)
def test_bad_input_raises_and_changes_nothing(backend, function, wrong, message, error):
    x = torch.randn(4, 3)
    before = x.clone()
    arguments = {"x": x, "lam": 0.5, "permutation": torch.tensor([1, 0, 3, 2])} | wrong
    with pytest.raises(error, match=f"^{function.__name__}: {message}"):
        function(**arguments, backend=backend)
    assert same_bits(x, before)


def test_inference_tensors_are_overwritten_in_inference_mode_only():
    with torch.inference_mode():
        x = torch.randn(4, 3)
        mixup_(x, 0.5, torch.tensor([1, 0, 3, 2]))
    before = x.clone()
    with pytest.raises(ValueError, match=r"^mixup_: x must not be an inference tensor"):
        mixup_(x, 0.5, torch.tensor([1, 0, 3, 2]))
    assert same_bits(x, before)


def test_overlapping_batch_is_refused():
    with pytest.raises(ValueError, match=r"^mixup_: x must not overlap itself, got strides \(0, 1\)"):
        mixup_(torch.randn(1, 3).expand(4, 3), 0.5, torch.arange(4))
    with pytest.raises(ValueError, match=r"^mixup_: x must not overlap itself, got strides \(2, 1\)"):
        mixup_(torch.arange(10.0).unfold(0, 4, 2), 0.5, torch.arange(4))
    windows = torch.arange(20.0).unfold(0, 3, 4).permute(1, 0)  # gaps between them
    expected = mixup(windows, 0.25, torch.tensor([1, 2, 0]))
    assert torch.equal(mixup_(windows, 0.25, torch.tensor([1, 2, 0])), expected)


@every_operator
def test_opcheck(backend):
    x, lam, permutation = random_batch((5, 3, 4, 6), torch.float32), shares_of(5), random_permutation(5)
    images = x.contiguous(memory_format=torch.channels_last)
    ops = torch.ops.ssl_kernels
    for batch in (x, images, x.bfloat16()):
        torch.library.opcheck(getattr(ops.mixup_, backend), (batch.clone(), lam, permutation))
        torch.library.opcheck(getattr(ops.mixup_fwd, backend), (batch, lam, permutation))
        for other, needed in ((batch, True), (None, True), (batch, False)):
            torch.library.opcheck(
                getattr(ops.mixup_bwd, backend), (torch.ones_like(batch), other, lam, permutation, needed)
            )


@pytest.mark.filterwarnings("ignore")
@every_operator
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(backend, dynamic):
    torch._dynamo.reset()

    def run(x, lam, permutation):
        mixed = mixup(x, lam, permutation, backend=backend)
        return mixup_(mixed.detach() * 1, 0.25, permutation, backend=backend), mixed

    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (6, 11) if dynamic else (6,):
        x = random_batch((batch, 3, 5), torch.float32).requires_grad_()
        lam, permutation = shares_of(batch).requires_grad_(), random_permutation(batch)
        results = []
        for function in (run, compiled):
            again, mixed = function(x, lam, permutation)
            results.append((again, mixed, *torch.autograd.grad(mixed.square().sum(), (x, lam))))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected)


def test_backends_are_listed():
    found = ssl_kernels.backends_for(mixup_, torch.randn(4, 3))
    assert [name for name, reason in found.items() if reason is None] == ["native", "chunked", "reference"]


@pytest.mark.slow
@settings(max_examples=400)
@given(calls(largest_batch=40), st.sampled_from(DTYPES))
def test_native_matches_float64_in_a_long_sweep(call, dtype):
    shape, layout, seed = call
    x, memory = in_layout(random_batch(shape, dtype, seed), layout)
    check("native", x, shares_of(shape[0], dtype, seed), random_permutation(shape[0], seed))
    assert untouched_outside(x, memory)
