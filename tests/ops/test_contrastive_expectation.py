"""The expectation that `contrastive` keeps where the columns need no gradient: values, backward, what is saved."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.reference.contrastive import contrastive as reference
from tests.helpers import random_rows, same_bits, saved_bytes
from tests.support.contrastive import check_results, exact, random_call, rounding_floor, term_sums

OPERATORS = ("chunked", "native")
every_operator = pytest.mark.parametrize("backend", OPERATORS)
MIXED = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
]


def forward(backend, call, *, keep=True, columns_need_grad=False):
    operator = getattr(torch.ops.ssl_kernels.contrastive_fwd, backend)
    return operator(*call.operands, *call.flags, keep, columns_need_grad)


def backward(backend, call, results, *, columns=True):
    lse, column_lse, _, row_rnorm, column_rnorm, kept = results
    rows, given_columns, *others = call.operands
    operands = (rows, given_columns if columns else None, *others)
    operator = getattr(torch.ops.ssl_kernels.contrastive_bwd, backend)
    saved = (lse, column_lse, row_rnorm, column_rnorm, kept)
    return operator(*call.upstream(), *operands, *saved, *call.flags, True, False)[:3]


def exact_expectation(call):
    """E in float64, from the gradient of lse by unit rows."""
    call = call.in_dtype(torch.float64)
    rows = (
        call.rows / call.rows.norm(dim=1, keepdim=True).clamp_min(1e-12) if call.normalize_rows else call.rows
    )
    rows.requires_grad_()
    options = call.options | {"normalize_rows": False}
    lse = reference(rows, call.columns, call.scale, **options)[0]
    lse = lse.where(lse != -torch.inf, 0)
    return torch.autograd.grad(lse.sum(), rows)[0] / call.scale


def check_against_float64(backend, call):
    """Every result and gradient, and E, is about as accurate as plain PyTorch's."""
    results = forward(backend, call)
    assert results[5].shape == call.rows.shape
    assert results[5].dtype == call.acc
    grad_rows, grad_columns, grad_scale = backward(backend, call, results)
    assert grad_columns.shape == (0,)
    found = {"lse": results[0], "grad_rows": grad_rows, "grad_scale": grad_scale}
    if call.positives is not None:
        found["positive_logits"] = results[2]
    check_results(found, call, backend, expectation=True)
    length = call.columns.double().norm(dim=1).max().item()
    largest = 1.0 if call.normalize_columns else max(1.0, length)
    rounded = (
        torch.finfo(torch.bfloat16).eps / 2 if call.rows.dtype == torch.bfloat16 else 0
    )  # the exponentials
    tolerance = (4 * rounding_floor(call, "grad_scale", term_sums(call)) + rounded) * largest
    torch.testing.assert_close(results[5].double(), exact_expectation(call), rtol=0, atol=tolerance)


SHAPES = [(1, 1, 1), (3, 700, 8), (70, 66, 33), (256, 1030, 40), (300, 517, 16), (1030, 40, 7)]


@every_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n, m, d", SHAPES)
def test_matches_float64(backend, dtype, n, m, d):
    for temperature in (1e-3, 0.07, 5.0):
        check_against_float64(backend, random_call(n, m, d, dtype, temperature=temperature))


@every_operator
@pytest.mark.parametrize("row_dtype, column_dtype", MIXED, ids=str)
def test_rows_and_columns_of_different_dtypes(backend, row_dtype, column_dtype):
    call = random_call(70, 530, 33, row_dtype, normalize_columns=False)
    call.columns = torch.nn.functional.normalize(call.columns.float()).to(column_dtype)
    check_against_float64(backend, call)


@pytest.mark.parametrize("backend", ["reference", *OPERATORS])
@pytest.mark.parametrize("row_dtype, column_dtype", MIXED, ids=str)
def test_gradients_have_the_dtypes_of_rows_and_columns(backend, row_dtype, column_dtype):
    rows, columns = random_rows(5, 8, row_dtype), random_rows(9, 8, column_dtype)
    leaves = [t.clone().requires_grad_() for t in (rows, columns)]
    lse = contrastive(*leaves, torch.tensor(5.0), backend=backend).lse
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = contrastive(*wide, torch.tensor(5.0, dtype=torch.float64), backend="reference").lse
    torch.testing.assert_close(lse, truth, rtol=1e-5, atol=1e-5)
    for found, exactly, leaf in zip(
        torch.autograd.grad(lse.sum(), leaves), torch.autograd.grad(truth.sum(), wide), leaves, strict=True
    ):
        assert found.dtype == leaf.dtype
        rounding = 1e-5 if leaf.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found.double(), exactly, rtol=rounding, atol=rounding)


@pytest.mark.parametrize("backend", OPERATORS)
def test_float64_goes_with_float64_alone(backend):
    message = {"native": "float64 goes with float64 alone", "chunked": "to have the same dtype"}[backend]
    with pytest.raises(RuntimeError, match=message):
        contrastive(random_rows(4, 3), random_rows(4, 3, torch.float64), torch.tensor(1.0), backend=backend)


@st.composite
def calls(draw):
    normalize = draw(st.booleans())
    return random_call(
        draw(st.one_of(st.integers(1, 80), st.integers(257, 300))),
        draw(st.one_of(st.integers(1, 80), st.integers(257, 1100))),
        draw(st.integers(1, 40)),
        draw(st.sampled_from([torch.float64, torch.float32, torch.float16])),
        temperature=10 ** draw(st.floats(-3, 2)),
        positives=draw(st.integers(0, 3)),
        ids=draw(st.integers(0, 4)),
        spread=draw(st.sampled_from([0.0, 0.3])),
        seed=draw(st.integers(0, 1000)),
        normalize_rows=normalize,
        normalize_columns=draw(st.booleans()),
        keep_diagonal=draw(st.booleans()),
    )


@given(call=calls())
def test_any_call_matches_float64(call):
    for backend in OPERATORS:
        check_against_float64(backend, call)


@every_operator
@pytest.mark.parametrize("scale", [0.0, -7.0, -200.0])
def test_scale_of_zero_and_below(backend, scale):
    call = random_call(70, 530, 8)
    call.scale.fill_(scale)
    results = forward(backend, call)
    grad_rows, _, grad_scale = backward(backend, call, results)
    truth = exact(call)
    torch.testing.assert_close(results[0], truth["lse"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(grad_rows.double(), truth["grad_rows"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_scale.double(), truth["grad_scale"], rtol=1e-4, atol=1e-3)


@every_operator
def test_rows_without_allowed_columns(backend):
    call = random_call(66, 530, 8, positives=0)
    call.row_ids = torch.zeros(66, dtype=torch.int64)
    call.row_ids[40:] = 1
    call.column_ids = torch.zeros(530, dtype=torch.int64)
    lse, _, _, _, _, kept = results = forward(backend, call)
    assert (lse[:40] == -torch.inf).all()
    assert (kept[:40] == 0).all()
    assert lse[40:].isfinite().all()
    grad_rows, _, grad_scale = backward(backend, call, results)
    assert (grad_rows[:40] == 0).all()
    assert (grad_rows[40:] != 0).any(dim=1).all()
    assert grad_scale.isfinite()


@every_operator
def test_columns_allowed_only_in_the_last_or_first_tile(backend):
    """Tiles in which a row has nothing do not disturb its sums, whichever come first."""
    for allowed in (slice(0, 3), slice(1097, 1100)):
        call = random_call(66, 1100, 8, temperature=0.01)
        call.row_ids = torch.zeros(66, dtype=torch.int64)
        call.column_ids = torch.zeros(1100, dtype=torch.int64)
        call.column_ids[allowed] = 1
        check_against_float64(backend, call)


@every_operator
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("scale", [2.0, 100.0])
def test_nan_and_inf_propagate(backend, poison, scale):
    call = random_call(70, 530, 8, normalize_columns=False, positives=0)
    call.scale.fill_(scale)
    call.rows[66, 3] = poison
    lse, _, _, _, _, kept = results = forward(backend, call)
    assert not lse[66].isfinite()
    assert not kept[66].isfinite().any()
    assert lse[:66].isfinite().all()
    assert kept[:66].isfinite().all()
    grad_rows, _, grad_scale = backward(backend, call, results)
    assert not grad_rows[66].isfinite().any()
    assert grad_rows[:66].isfinite().all()
    assert not grad_scale.isfinite()
    call = random_call(70, 530, 8, normalize_columns=False, positives=0)
    call.columns[400, 2] = torch.nan
    lse, _, _, _, _, kept = forward(backend, call)
    assert lse.isnan().all()
    assert kept.isnan()[:, 2].all()


@every_operator
def test_overwritten_columns_do_not_matter_to_backward(backend):
    """Without positives backward reads the rows and the scale alone: the queue may be pushed to in between."""
    call = random_call(66, 700, 8, positives=0)
    rows = call.rows.clone().requires_grad_()
    columns = call.columns.clone()
    lse = contrastive(rows, columns, call.scale, backend=backend).lse
    (expected,) = torch.autograd.grad(lse.sum(), rows, retain_graph=True)
    columns.fill_(torch.nan)
    assert same_bits(torch.autograd.grad(lse.sum(), rows)[0], expected)


@every_operator
def test_overwritten_columns_are_noticed_where_positives_need_them(backend):
    call = random_call(66, 700, 8)
    rows, columns = call.rows.clone().requires_grad_(), call.columns.clone()
    result = contrastive(rows, columns, call.scale, positives=call.positives, backend=backend)
    columns.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (result.lse - result.positive_logits).sum().backward()


@every_operator
def test_what_is_saved_does_not_grow_with_the_columns(backend):
    call = random_call(64, 5000, 16, positives=0)
    rows = call.rows.clone().requires_grad_()
    saved = saved_bytes(lambda: contrastive(rows, call.columns, call.scale, backend=backend))
    assert saved <= 2 * rows.nbytes + 64 * 4 + 64 * 8 + 5000 * 4 + 64


@every_operator
@pytest.mark.parametrize("positives_per_row", [0, 2])
@pytest.mark.parametrize("temperature", [0.01, 0.5])
def test_gradcheck(backend, positives_per_row, temperature):
    call = random_call(
        4,
        6,
        3,
        torch.float64,
        temperature=temperature,
        positives=positives_per_row,
        ids=3,
        spread=0.3,
    )
    call.row_ids[0] = 17
    for normalize in (True, False):
        call.normalize_rows = call.normalize_columns = normalize

        def run(rows, scale, options=call.options):
            results = contrastive(rows, call.columns, scale, backend=backend, **options)
            return [torch.where(result == -torch.inf, 0, result) for result in results if result.numel()]

        assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in (call.rows, call.scale)])


@every_operator
@pytest.mark.parametrize("positives_per_row", [0, 1])
def test_opcheck(backend, positives_per_row):
    call = random_call(7, 300, 40, torch.bfloat16, positives=positives_per_row)
    operator = torch.ops.ssl_kernels.contrastive_fwd
    torch.library.opcheck(getattr(operator, backend), (*call.operands, *call.flags, True, False))
    results = forward(backend, call)
    lse, column_lse, _, row_rnorm, column_rnorm, kept = results
    saved = (lse, column_lse, row_rnorm, column_rnorm, kept)
    arguments = (*call.upstream(), *call.operands, *saved, *call.flags, True, False)
    torch.library.opcheck(getattr(torch.ops.ssl_kernels.contrastive_bwd, backend), arguments)


@every_operator
def test_columns_may_be_left_out_of_backward_without_positives(backend):
    call = random_call(66, 700, 8, positives=0)
    results = forward(backend, call)
    for first, second in zip(
        backward(backend, call, results), backward(backend, call, results, columns=False), strict=True
    ):
        assert same_bits(first, second)


@every_operator
def test_other_cases_keep_no_expectation(backend):
    call = random_call(66, 70, 8, positives=0)
    assert forward(backend, call, keep=False)[5].dim() == 1
    assert forward(backend, call, columns_need_grad=True)[5].dim() == 1
    assert forward(backend, call.replace(both_directions=True))[5].dim() == 1
    assert forward(backend, call.replace(columns=None))[5].dim() == 1


@pytest.mark.filterwarnings("ignore")
@every_operator
def test_compiles_without_a_graph_break(backend):
    torch._dynamo.reset()
    call = random_call(6, 300, 40, positives=0)

    def run(rows, columns, scale):
        return contrastive(rows, columns, scale, backend=backend).lse

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (run, compiled):
        rows = call.rows.clone().requires_grad_()
        lse = function(rows, call.columns, call.scale)
        gradients.append((lse.detach(), torch.autograd.grad(lse.sum(), rows)[0]))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_any_number_of_threads(set_threads, threads):
    """Few rows: the columns are split over the threads and merged. Many: each thread has rows of its own."""
    set_threads(threads)
    for n, m in ((1, 700), (70, 1100), (600, 530)):
        for temperature in (0.01, 0.5):
            call = random_call(n, m, 33, temperature=temperature)
            check_against_float64("native", call)
            first, again = (forward("native", call) for _ in range(2))
            assert all(same_bits(a, b) for a, b in zip(first, again, strict=True))


@every_operator
def test_rising_and_falling_logits(backend):
    """Each tile raises every row's maximum, or none does: what was added up before is rescaled."""
    for descending in (False, True):
        call = random_call(66, 1100, 2, temperature=0.02, normalize_columns=False)
        call.rows[:] = torch.tensor([1.0, 0.1])
        call.columns[:, 0] = torch.linspace(-1, 1, 1100).sort(descending=descending).values
        check_against_float64(backend, call)


def test_native_backward_refuses_a_foreign_expectation():
    call = random_call(6, 9, 3, positives=0)
    results = list(forward("native", call))
    for kept in (results[5][:5], results[5].double()):
        with pytest.raises(RuntimeError, match="kept must be what contrastive_fwd returned"):
            backward("native", call, [*results[:5], kept])


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("temperature", [0.05, 0.2])
def test_bfloat16_softmax_near_its_target(normalize, temperature):
    """What is left of E and the positive where they are nearly the same: row by row, as near as plain bfloat16."""
    columns = random_rows(200, 64, torch.bfloat16, seed=1)
    rows = columns[:150] + 0.3 * random_rows(150, 64, torch.bfloat16, seed=2)
    if not normalize:
        columns, rows = (F.normalize(each.float()).bfloat16() for each in (columns, rows))
    positives, flags = torch.arange(150), {"normalize_rows": normalize, "normalize_columns": normalize}

    def gradient(run, dtype):
        x = rows.to(dtype).requires_grad_()
        scale = torch.tensor(
            1 / temperature, dtype=torch.float64 if dtype == torch.float64 else torch.float32
        )
        lse, _, positive = run(x, columns.to(dtype), scale, positives=positives, **flags)
        return torch.autograd.grad((lse - positive).sum(), x)[0].double()

    def plain(x, y, scale, **_):
        x, y = (F.normalize(x), F.normalize(y)) if normalize else (x, y)
        logits = x @ y.T * scale.to(x.dtype)
        return logits.logsumexp(1), None, logits.diagonal()

    truth = gradient(reference, torch.float64)
    size = truth.norm(dim=1)

    def error(found):
        return ((found - truth).norm(dim=1) / size).max().item()

    found = error(gradient(functools.partial(contrastive, backend="native"), torch.bfloat16))
    assert found <= min(0.1, error(gradient(plain, torch.bfloat16)))
