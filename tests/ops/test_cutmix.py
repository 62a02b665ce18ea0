"""`cutmix_`, `cutmix` and its gradient on every backend of the CPU, against pixels moved one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ssl_kernels
from ssl_kernels import cutmix, cutmix_
from tests.helpers import BACKENDS, DTYPES, OPERATORS, same_bits
from tests.support.mixing import (
    LAYOUTS,
    PERMUTATIONS,
    boxes_of,
    calls,
    check_rounded_once,
    in_layout,
    permutation_of,
    random_batch,
    random_permutation,
    untouched_outside,
)

PIXEL_DTYPES = (*DTYPES, torch.uint8, torch.int64, torch.bool, torch.int32, torch.int16)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_operator = pytest.mark.parametrize("backend", OPERATORS)


def definition(x, boxes, permutation):
    pasted = x.clone(memory_format=torch.contiguous_format)
    for i, (box, partner) in enumerate(zip(boxes.tolist(), permutation.tolist(), strict=True)):
        y0, y1, x0, x1 = box
        pasted[i, ..., y0:y1, x0:x1] = x[partner, ..., y0:y1, x0:x1]
    return pasted


def contiguous(x):
    return x.clone(
        memory_format=torch.contiguous_format
    )  # a single number may have any stride in x.contiguous()


def check(backend, x, boxes, permutation):
    """In place and out of place."""
    expected = definition(x, boxes, permutation)
    new = cutmix(x, boxes, permutation, backend=backend)
    assert backend == "reference" or new.stride() == torch.empty_like(x).stride()
    assert same_bits(contiguous(new), expected)
    assert cutmix_(x, boxes, permutation, backend=backend) is x
    assert same_bits(contiguous(x), expected)


@every_backend
@given(calls(least_dims=3), st.sampled_from(PIXEL_DTYPES))
def test_matches_the_definition(backend, call, dtype):
    shape, layout, seed = call
    x, memory = in_layout(random_batch(shape, dtype, seed), layout)
    check(backend, x, boxes_of(shape[0], *shape[-2:], seed), random_permutation(shape[0], seed))
    if dtype != torch.bool:  # which has no value left for a canary
        assert untouched_outside(x, memory)


@every_operator
@pytest.mark.parametrize("layout", LAYOUTS)
def test_across_bands(backend, layout):
    x, memory = in_layout(random_batch((4, 3, 190, 201), torch.float32), layout)
    check(backend, x, boxes_of(len(x), *x.shape[-2:]), torch.tensor([2, 3, 1, 0]))
    assert untouched_outside(x, memory)


@every_backend
@pytest.mark.parametrize("batch", [1, 2, 7, 64])
def test_any_permutation(backend, batch):
    for kind in (*PERMUTATIONS, "pairs"):
        permutation = permutation_of(kind, batch)
        x = random_batch((batch, 2, 9, 8), torch.float32)
        check(backend, x, boxes_of(len(x), *x.shape[-2:]), permutation)


@every_backend
def test_chain_of_overlapping_boxes(backend):
    """Every sample is pasted into and pasted from, at the same pixels."""
    x = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 6, 6).contiguous()
    boxes = torch.tensor([[1, 5, 1, 5], [2, 6, 0, 6], [0, 6, 2, 4], [2, 4, 2, 6]])
    cutmix_(x, boxes, torch.tensor([1, 2, 3, 0]), backend=backend)
    assert x[:, 0, 3, 3].tolist() == [1, 2, 3, 0]
    assert x[:, 0, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", OPERATORS)
def test_pixels_outside_the_boxes_are_not_written(backend):
    """Nor do they leak into what is inside: those outside are NaN."""
    x = random_batch((6, 3, 20, 20), torch.float32)
    boxes = torch.tensor([[5, 12, 3, 17]]).expand(6, 4)
    x[..., :5, :] = torch.nan
    before = x.clone()
    cutmix_(x, boxes, random_permutation(6), backend=backend)
    assert same_bits(x[..., :5, :], before[..., :5, :])
    assert x[..., 5:, :].isfinite().all()


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(calls(least_dims=3, most_dims=4), st.booleans())
def test_gradient_matches_float64(backend, dtype, call, same_layout):
    shape, layout, seed = call
    x = in_layout(random_batch(shape, dtype, seed), layout)[0].requires_grad_()
    grad = random_batch(shape, dtype, seed + 1)
    if same_layout:
        grad, _ = in_layout(grad, layout)
    boxes, permutation = boxes_of(shape[0], *shape[-2:], seed), random_permutation(shape[0], seed)
    (found,) = torch.autograd.grad(cutmix(x, boxes, permutation, backend=backend), x, grad)
    truth, sums = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    for i, partner in enumerate(permutation.tolist()):
        y0, y1, x0, x1 = boxes[i].tolist()
        inside = torch.zeros(shape[1:], dtype=torch.bool)
        inside[..., y0:y1, x0:x1] = True
        for sample, where in ((i, ~inside), (partner, inside)):
            truth[sample] += torch.where(where, grad[i].double(), 0)
            sums[sample] += torch.where(where, grad[i].double(), 0).abs()
    assert found.dtype == dtype
    check_rounded_once(found, truth, sums)


@every_backend
def test_gradcheck(backend):
    x = random_batch((5, 2, 3, 4), torch.float64).requires_grad_()
    boxes, permutation = boxes_of(len(x), *x.shape[-2:]), torch.tensor([2, 0, 1, 3, 4])

    def run(x):
        return cutmix(x, boxes, permutation, backend=backend)

    assert torch.autograd.gradcheck(run, (x,))
    assert torch.autograd.gradgradcheck(run, (x,))


BAD_VALUES = [
    ({"permutation": torch.tensor([0, 1, 1, 2])}, "permutation must hold each of 0 to 3 once"),
    ({"permutation": torch.tensor([0, 1, 2, 9])}, "permutation must hold each of 0 to 3 once"),
    *[
        ({"boxes": torch.tensor([[0, 0, 0, 0]] * 3 + [bad])}, r"boxes must be \(y0, y1, x0, x1\) with")
        for bad in (
            *([0, 6, 0, 1], [-1, 2, 0, 1], [3, 2, 0, 1], [0, 1, 0, 8], [0, 1, -1, 1], [0, 1, 2, 1]),
            *([0, 2**62, 0, 1], [-(2**63), 1, 0, 1]),
        )
    ],
    ({"boxes": torch.zeros(4, 3, dtype=torch.int64)}, r"boxes must have shape \(4, 4\), got \(4, 3\)"),
    ({"boxes": torch.zeros(3, 4, dtype=torch.int64)}, r"boxes must have shape \(4, 4\), got \(3, 4\)"),
    ({"x": torch.randn(4, 5)}, r"x must have shape \(B, ..., H, W\) with no dimension of 0, got \(4, 5\)"),
    ({"x": torch.randn(0, 3, 5, 7)}, r"x must have shape \(B, ..., H, W\) with no dimension of 0"),
    (
        {"boxes": torch.zeros(4, 4, dtype=torch.int64, device="meta")},
        "boxes must be on cpu as x is, got meta",
    ),
]
BAD_TYPES = [
    ({"x": None}, "x must be a tensor, got NoneType"),
    ({"x": torch.ones(4, 3, 5, 7).to_sparse()}, "x must be a dense tensor, got a sparse_coo one"),
    ({"boxes": torch.zeros(4, 4)}, "boxes must be int64, got float32"),
    ({"boxes": torch.zeros(4, 4, dtype=torch.int32)}, "boxes must be int64, got int32"),
    ({"boxes": [[0, 1, 0, 1]] * 4}, "boxes must be a tensor, got list"),
    ({"boxes": torch.zeros(4, 4, dtype=torch.int64).to_sparse()}, "boxes must be a dense tensor"),
    ({"permutation": torch.zeros(4)}, "permutation must be int64, got float32"),
]


@every_backend
@pytest.mark.parametrize("function", [cutmix, cutmix_], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "wrong, message, error",
    [(*case, ValueError) for case in BAD_VALUES] + [(*case, TypeError) for case in BAD_TYPES],
)
def test_bad_input_raises_and_changes_nothing(backend, function, wrong, message, error):
    x = torch.randn(4, 3, 5, 7)
    before = x.clone()
    whole = torch.tensor([[0, 5, 0, 7]] * 4)
    arguments = {"x": x, "boxes": whole, "permutation": torch.tensor([1, 0, 3, 2])} | wrong
    with pytest.raises(error, match=f"^{function.__name__}: {message}"):
        function(**arguments, backend=backend)
    assert same_bits(x, before)


def test_overlapping_batch_is_refused():
    with pytest.raises(ValueError, match=r"^cutmix_: x must not overlap itself"):
        cutmix_(torch.randn(1, 3, 5, 7).expand(4, 3, 5, 7), torch.zeros(4, 4, dtype=int), torch.arange(4))


@every_operator
def test_in_place_is_noticed_by_autograd(backend):
    with pytest.raises(ValueError, match=r"^cutmix_: x must not require grad"):
        cutmix_(torch.randn(2, 1, 3, 3, requires_grad=True), torch.zeros(2, 4, dtype=int), torch.arange(2))
    weight = torch.randn(2, 1, 3, 3, requires_grad=True)
    squares = weight * weight
    loss = (squares * squares).sum()
    cutmix_(squares.detach(), torch.tensor([[0, 1, 0, 1]] * 2), torch.tensor([1, 0]), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_operator
def test_opcheck(backend):
    x = random_batch((5, 3, 4, 6), torch.float32)
    boxes, permutation = boxes_of(len(x), *x.shape[-2:]), random_permutation(5)
    ops = torch.ops.ssl_kernels
    for batch in (x, x.contiguous(memory_format=torch.channels_last), x[..., ::2].bfloat16()):
        inside = boxes_of(len(batch), *batch.shape[-2:])
        torch.library.opcheck(getattr(ops.cutmix_, backend), (batch.clone(), inside, permutation))
        torch.library.opcheck(getattr(ops.cutmix_fwd, backend), (batch, inside, permutation))
        torch.library.opcheck(getattr(ops.cutmix_bwd, backend), (batch, inside, permutation))
    torch.library.opcheck(getattr(ops.cutmix_, backend), (x.to(torch.uint8), boxes, permutation))


@pytest.mark.filterwarnings("ignore")
@every_operator
def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()

    def run(x, boxes, permutation):
        pasted = cutmix(x, boxes, permutation, backend=backend)
        return cutmix_(pasted.detach() * 1, boxes, permutation, backend=backend), pasted

    x = random_batch((6, 3, 5, 7), torch.float32).requires_grad_()
    boxes, permutation = boxes_of(len(x), *x.shape[-2:]), random_permutation(6)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for function in (run, compiled):
        again, pasted = function(x, boxes, permutation)
        results.append((again, pasted, *torch.autograd.grad(pasted.square().sum(), x)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_backends_are_listed():
    found = ssl_kernels.backends_for(cutmix_, torch.randn(4, 3, 2, 2))
    assert [name for name, reason in found.items() if reason is None] == ["native", "chunked", "reference"]
