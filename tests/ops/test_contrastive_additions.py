"""Biases, limits and ids with a sense of `contrastive`, against dense algebra in float64 and its autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from ssl_kernels.ops.contrastive import contrastive
from tests.helpers import BACKENDS, OPERATORS
from tests.support.contrastive import (
    check_against_float64,
    check_results,
    exact,
    on_backend,
    random_call,
    results_and_gradients,
)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_operator = pytest.mark.parametrize("backend", OPERATORS)


def dense(
    rows,
    columns,
    scale,
    *,
    positives=None,
    row_ids=None,
    column_ids=None,
    keep_diagonal=False,
    both_directions=False,
    column_bias=None,
    row_bias=None,
    row_limit=None,
    exempt=None,
    only_equal_ids=False,
    **normalized,
):
    """lse, column_lse, positive_logits by their definition."""
    x = F.normalize(rows, dim=1)
    y = x if columns is None else F.normalize(columns, dim=1)
    logits = scale * x @ y.T
    n, m = logits.shape
    out = torch.zeros(n, m, dtype=torch.bool)
    if row_ids is not None:
        equal = row_ids[:, None] == (row_ids if columns is None else column_ids)
        out = ~equal if only_equal_ids else equal
    diagonal = torch.eye(n, m, dtype=torch.bool)
    if columns is None:
        out = out | diagonal
    elif keep_diagonal:
        out = out & ~diagonal
    index = None if positives is None else positives.remainder(m).view(n, -1)
    if row_limit is not None:
        above = logits.detach() > row_limit[:, None]
        if exempt is not None:
            above &= ~exempt
        if index is not None:
            above.scatter_(1, index, False)
        out = out | above

    def lse(biased, dim):
        biased = biased.masked_fill(out, -torch.inf)
        empty = (biased == -torch.inf).all(dim, keepdim=True)
        found = torch.logsumexp(biased.masked_fill(empty, 0), dim)
        return found.masked_fill(empty.squeeze(dim), -torch.inf)

    by_rows = lse(logits if column_bias is None else logits + column_bias, 1)
    by_columns = logits.new_empty(0)
    if both_directions:
        by_columns = lse(logits if row_bias is None else logits + row_bias[:, None], 0)
    at_positives = logits.new_empty(0) if index is None else logits.gather(1, index).view(positives.shape)
    return by_rows, by_columns, at_positives


WORDS = [
    (bias, limit, ids)
    for bias, limit, ids in itertools.product(
        ("", "bias", "bias padding"), ("", "limit", "limit exempt"), (None, "equal", "only")
    )
    if bias or limit or ids == "only"
]
every_combination = pytest.mark.parametrize("shape", ["square", "rectangle", "both"])


def call_of(n, m, shape, bias, limit, ids, dtype=torch.float64, d=9, **options):
    return random_call(
        n, None if shape == "square" else m, d, dtype, both_directions=shape == "both", ids=4 if ids else 0,
        keep_diagonal=shape != "square" and n % 2 == 1, additions=f"{bias} {limit} {ids}", **options,
    )  # fmt: skip


def combined(shape, bias, limit, ids):
    for (n, m), positives, temperature in (((1, 1), 0, 1.0), ((7, 11), 1, 0.02), ((20, 13), 2, 1.0)):
        yield call_of(n, m, shape, bias, limit, ids, positives=positives, temperature=temperature)


@every_combination
@pytest.mark.parametrize("bias, limit, ids", WORDS)
def test_reference_is_dense_algebra(shape, bias, limit, ids):
    for call in combined(shape, bias, limit, ids):
        found, expected = (results_and_gradients(run, call) for run in (on_backend("reference"), dense))
        for name, truth in expected.items():
            torch.testing.assert_close(found[name], truth, rtol=1e-8, atol=1e-8)


@every_operator
@every_combination
@pytest.mark.parametrize("bias, limit, ids", WORDS)
def test_every_combination_matches_float64(backend, shape, bias, limit, ids):
    for call in combined(shape, bias, limit, ids):
        check_against_float64(backend, call)


@every_operator
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape, n, m", [("square", 600, 0), ("rectangle", 300, 700), ("both", 520, 300)])
def test_over_several_tiles(backend, set_threads, shape, n, m, threads):
    set_threads(threads)
    for temperature, positives in ((0.5, 1), (0.02, 0)):
        options = {"positives": positives, "temperature": temperature, "d": 40}
        check_against_float64(
            backend, call_of(n, m, shape, "bias padding", "limit exempt", "equal", **options)
        )


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["square", "rectangle", "both"])
def test_every_dtype_matches_float64(backend, dtype, shape):
    for limit in ("", "limit"):
        check_against_float64(backend, call_of(90, 130, shape, "bias padding", limit, "only", dtype, d=40))


@every_operator
def test_the_expectation_takes_them_too(backend):
    """Frozen columns: one pass, no recompute."""
    call = call_of(40, 300, "rectangle", "bias padding", "limit exempt", "only")
    lse, _, positive_logits, row_rnorm, column_rnorm, kept = getattr(
        torch.ops.ssl_kernels.contrastive_fwd, backend
    )(*call.operands, *call.flags, True, False, *call.additions)
    assert kept.shape == call.rows.shape
    g, _, q = call.upstream()
    saved = (lse, None, row_rnorm, column_rnorm, kept)
    grad_rows, _, grad_scale, *_ = getattr(torch.ops.ssl_kernels.contrastive_bwd, backend)(
        g, None, q, *call.operands, *saved, *call.flags, True, False, *call.additions, False, False
    )
    found = {"lse": lse, "positive_logits": positive_logits, "grad_rows": grad_rows, "grad_scale": grad_scale}
    check_results(found, call, backend, expectation=True)


@every_backend
def test_a_row_that_has_nothing_left(backend):
    call = call_of(6, 9, "both", "bias", "limit", None, positives=0)
    call.row_limit[2] = -torch.inf
    call.column_bias[4] = -torch.inf
    found = results_and_gradients(on_backend(backend), call)
    assert found["lse"][2] == -torch.inf and not any(each.isnan().any() for each in found.values())
    assert (found["grad_rows"][2] == 0).all()
    call.column_bias[:] = -torch.inf
    call.row_limit = None
    found = results_and_gradients(on_backend(backend), call)
    assert (found["lse"] == -torch.inf).all() and (found["grad_column_bias"] == 0).all()


@every_backend
def test_a_logit_at_its_limit_stays_and_so_does_nan(backend):
    rows = torch.eye(3, dtype=torch.float64)
    columns = torch.tensor([[1.0, 0, 0], [0.5, 0, 0]], dtype=torch.float64)
    options = {"normalize_rows": False, "normalize_columns": False, "backend": backend}
    limit = torch.tensor([0.5, 0.0, 0.25], dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)
    lse = contrastive(rows, columns, one, row_limit=limit, **options).lse
    expected = torch.tensor([0.5, 0.6931471805599453, 0.6931471805599453], dtype=torch.float64)
    torch.testing.assert_close(lse, expected)
    rows[1, 1] = torch.nan
    assert contrastive(rows, columns, one, row_limit=limit, **options).lse.isnan().tolist() == [
        False,
        True,
        False,
    ]


@every_backend
def test_nan_of_a_bias_reaches_what_it_is_added_to(backend):
    call = call_of(6, 9, "rectangle", "bias", "", None, positives=0)
    call.column_bias[1] = torch.nan
    assert on_backend(backend)(*call.operands[:3], **call.options).lse.isnan().all()


@every_backend
@pytest.mark.parametrize("bias", [torch.inf, torch.nan])
def test_no_bias_brings_back_what_is_left_out(backend, bias):
    rows, columns = torch.randn(3, 8), torch.randn(4, 8)
    ids, biases = torch.arange(4), torch.tensor([bias, 0.1, 0.2, 0.3])
    run, scale = on_backend(backend), torch.tensor(2.0)
    found = run(rows, columns, scale, row_ids=ids[:1].expand(3), column_ids=ids, column_bias=biases).lse
    torch.testing.assert_close(found, run(rows, columns[1:], scale, column_bias=biases[1:]).lse)


@every_operator
def test_the_limit_has_no_gradient_and_the_bias_alone_may_learn(backend):
    call = call_of(12, 9, "both", "bias", "limit", None)
    expected = exact(call)
    biases = [call.column_bias.requires_grad_(), call.row_bias.requires_grad_()]
    call.row_limit.requires_grad_()
    results = on_backend(backend)(*call.operands[:3], **call.options)
    found = torch.autograd.grad(results, [*biases, call.row_limit], call.upstream(), allow_unused=True)
    for grad, name in zip(found[:2], ("grad_column_bias", "grad_row_bias"), strict=True):
        torch.testing.assert_close(grad, expected[name], rtol=1e-8, atol=1e-8)
    assert found[2] is None


@every_operator
def test_second_derivative_is_an_error(backend):
    call = call_of(5, 6, "both", "bias", "", None, positives=0)
    leaf = call.column_bias.requires_grad_()
    lse = on_backend(backend)(call.rows.requires_grad_(), *call.operands[1:3], **call.options).lse.sum()
    (grad,) = torch.autograd.grad(lse, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


@every_operator
@pytest.mark.parametrize("shape", ["square", "both"])
def test_operators_are_registered_as_torch_asks(backend, shape):
    call = call_of(5, 6, shape, "bias", "limit exempt", "only", temperature=0.5)
    wanted = (True, shape == "both")
    forward = getattr(torch.ops.ssl_kernels.contrastive_fwd, backend)
    tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
    chosen = tests if backend == "native" else tests[:2]
    learning = call.map(lambda t: t.clone().requires_grad_(t.is_floating_point() and t is not call.row_limit))
    arguments = (*learning.operands, *learning.flags, True, True, *learning.additions)
    torch.library.opcheck(forward, arguments, test_utils=chosen)
    lse, column_lse, _, *saved = forward(*call.operands, *call.flags, True, True, *call.additions)
    arguments = (
        torch.ones_like(lse), None, None, *call.operands, lse, column_lse, *saved, *call.flags, True,
        not call.square, *call.additions, *wanted,
    )  # fmt: skip
    backward = getattr(torch.ops.ssl_kernels.contrastive_bwd, backend)
    torch.library.opcheck(backward, arguments, test_utils=tests[:2])
