"""Biases, limits and ids with a sense of `contrastive`, against dense algebra in float64 and its autograd."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from ssl_kernels.ops.contrastive import contrastive
from tests.helpers import BACKENDS, OPERATORS, random_rows

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


def arguments(n, m, shape, *, bias, limit, ids, positives, temperature, dtype=torch.float64, d=9):
    """(operands, options, leaves) of a call; of "square" m is n."""
    generator = torch.Generator().manual_seed(100 * n + m)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    m = n if shape == "square" else m
    rows = random_rows(n, d, dtype).requires_grad_()
    columns = None if shape == "square" else random_rows(m, d, dtype, seed=1).requires_grad_()
    scale = torch.tensor(1 / temperature, dtype=acc, requires_grad=True)
    options = {"both_directions": shape == "both"}
    if bias:
        column_bias = 2 * torch.randn(m, generator=generator, dtype=torch.float64)
        column_bias[::3] = -torch.inf if bias == "padding" else 0.5
        options["column_bias"] = column_bias.to(acc).requires_grad_()
        if shape == "both":
            row_bias = torch.randn(n, generator=generator, dtype=torch.float64)
            options["row_bias"] = row_bias.to(acc).requires_grad_()
    if limit:
        row_limit = (2 * torch.rand(n, generator=generator, dtype=torch.float64) - 1) / temperature
        options["row_limit"] = row_limit.to(acc)
        if limit == "exempt":
            options["exempt"] = torch.rand(m, generator=generator) < 0.3
    if ids:
        options["row_ids"] = torch.randint(4, (n,), generator=generator)
        options["only_equal_ids"] = ids == "only"
        if shape != "square":
            options["column_ids"] = torch.randint(4, (m,), generator=generator)
            options["keep_diagonal"] = n % 2 == 1
    if positives:
        options["positives"] = torch.randint(-m, m, (n, positives), generator=generator)
    operands = (rows, columns, scale)
    leaves = [*operands, options.get("column_bias"), options.get("row_bias")]
    return operands, options, [leaf for leaf in leaves if leaf is not None]


def results_and_gradients(results, leaves):
    objective = 0
    for k, value in enumerate(results):
        weight = random_rows(max(1, value.numel()), 1, torch.float64, seed=k)[: value.numel(), 0]
        objective = objective + (weight * value.flatten().where(value.flatten() != -torch.inf, 0)).sum()
    gradients = torch.autograd.grad(objective, leaves, allow_unused=True)
    zeros = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, leaves, strict=True)]
    return [*(value.detach() for value in results), *zeros]


def check(backend, operands, options, leaves, **close):
    found = results_and_gradients(contrastive(*operands, **options, backend=backend), leaves)
    expected = results_and_gradients(dense(*operands, **options), leaves)
    for ours, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, truth, **close)


COMBINATIONS = [
    call
    for call in itertools.product(
        (None, "numbers", "padding"), (None, "rows", "exempt"), (None, "equal", "only")
    )
    if any(call[:2]) or call[2] == "only"
]


@every_backend
@pytest.mark.parametrize("shape", ["square", "rectangle", "both"])
@pytest.mark.parametrize("bias, limit, ids", COMBINATIONS)
def test_every_combination(backend, shape, bias, limit, ids):
    for (n, m), positives, temperature in (((1, 1), 0, 1.0), ((7, 11), 1, 0.02), ((20, 13), 2, 1.0)):
        call = arguments(
            n, m, shape, bias=bias, limit=limit, ids=ids, positives=positives, temperature=temperature
        )
        check(backend, *call, rtol=1e-8, atol=1e-8 / temperature)


@every_operator
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shape, n, m", [("square", 600, 0), ("rectangle", 300, 700), ("both", 520, 300)])
def test_over_several_tiles(backend, shape, n, m, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for temperature, positives in ((0.5, 1), (0.02, 0)):
            call = arguments(
                n,
                m,
                shape,
                bias="padding",
                limit="exempt",
                ids="equal",
                positives=positives,
                temperature=temperature,
                d=40,
            )
            check(backend, *call, rtol=1e-8, atol=1e-8 / temperature)
    finally:
        torch.set_num_threads(before)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", ["square", "rectangle", "both"])
def test_no_worse_than_dense_algebra_in_the_same_dtype(backend, dtype, shape):
    made = {"bias": "padding", "limit": None, "ids": "only", "positives": 1, "temperature": 0.1, "d": 40}
    operands, options, leaves = arguments(90, 130, shape, **made, dtype=dtype)
    wide_operands = [t if t is None else t.detach().double().requires_grad_() for t in operands]
    wide_options = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in options.items()
    }
    wide = [
        t
        for t in (*wide_operands, wide_options.get("column_bias"), wide_options.get("row_bias"))
        if t is not None
    ]
    truth = results_and_gradients(dense(*wide_operands, **wide_options), wide)
    found = results_and_gradients(contrastive(*operands, **options, backend=backend), leaves)
    for ours, exact in zip(found, truth, strict=True):
        finite = exact.isfinite()
        assert torch.equal(ours.isfinite(), finite)
        error = (ours.double() - exact)[finite].abs().max().item() if finite.any() else 0
        largest = exact[finite].abs().max().item() if finite.any() else 0
        assert error <= 30 * torch.finfo(dtype).eps * max(largest, 1)


@every_operator
def test_the_expectation_takes_them_too(backend):
    """Frozen columns: one pass, no recompute."""
    operands, options, _ = arguments(
        40, 300, "rectangle", bias="padding", limit="exempt", ids="only", positives=1, temperature=0.1
    )
    rows, columns, scale = operands
    columns = columns.detach()
    options["column_bias"] = options["column_bias"].detach()
    check(backend, (rows, columns, scale), options, [rows, scale], rtol=1e-8, atol=1e-8)


@every_backend
def test_a_row_that_has_nothing_left(backend):
    operands, options, leaves = arguments(
        6, 9, "both", bias="numbers", limit="rows", ids=None, positives=0, temperature=0.1
    )
    options["row_limit"][2] = -torch.inf
    with torch.no_grad():
        options["column_bias"][4] = -torch.inf
    found = results_and_gradients(contrastive(*operands, **options, backend=backend), leaves)
    assert found[0][2] == -torch.inf and all(not each.isnan().any() for each in found)
    assert (found[3][2] == 0).all()
    with torch.no_grad():
        options["column_bias"][:] = -torch.inf
        del options["row_limit"]
    found = results_and_gradients(contrastive(*operands, **options, backend=backend), leaves)
    assert (found[0] == -torch.inf).all() and (found[6] == 0).all()


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
    operands, options, _ = arguments(
        6, 9, "rectangle", bias="numbers", limit=None, ids=None, positives=0, temperature=0.1
    )
    with torch.no_grad():
        options["column_bias"][1] = torch.nan
    assert contrastive(*operands, **options, backend=backend).lse.isnan().all()


@every_operator
def test_the_limit_has_no_gradient_and_the_bias_alone_may_learn(backend):
    operands, options, _ = arguments(
        12, 9, "both", bias="numbers", limit="rows", ids=None, positives=1, temperature=0.1
    )
    rows, columns, scale = (each.detach() for each in operands)
    check(
        backend,
        (rows, columns, scale),
        options,
        [options["column_bias"], options["row_bias"]],
        rtol=1e-8,
        atol=1e-8,
    )


@every_operator
def test_second_derivative_is_an_error(backend):
    operands, options, _ = arguments(
        5, 6, "both", bias="numbers", limit=None, ids=None, positives=0, temperature=0.5
    )
    lse = contrastive(*operands, **options, backend=backend).lse.sum()
    (grad,) = torch.autograd.grad(lse, options["column_bias"], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.square().sum().backward()


@every_operator
@pytest.mark.parametrize("shape", ["square", "both"])
def test_operators_are_registered_as_torch_asks(backend, shape):
    (rows, columns, scale), options, _ = arguments(
        5, 6, shape, bias="numbers", limit="exempt", ids="only", positives=1, temperature=0.5
    )
    names = ("column_bias", "row_bias", "row_limit", "exempt", "only_equal_ids")
    additions = [options.get(name) for name in names]
    operands = [rows, columns, scale, *(options.get(name) for name in ("positives", "row_ids", "column_ids"))]
    flags = [True, True, False, shape == "both"]
    forward = getattr(torch.ops.ssl_kernels.contrastive_fwd, backend)
    tests = ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic", "test_autograd_registration"]
    chosen = tests if backend == "native" else tests[:2]
    torch.library.opcheck(forward, (*operands, *flags, True, True, *additions), test_utils=chosen)
    operands, additions = (
        [None if t is None or isinstance(t, bool) else t.detach() for t in group]
        for group in (operands, additions)
    )
    additions[-1] = True
    lse, column_lse, _, *saved = forward(*operands, *flags, True, True, *additions)
    call = (
        torch.ones_like(lse),
        None,
        None,
        *operands,
        lse,
        column_lse,
        *saved,
        *flags,
        True,
        columns is not None,
    )
    call += (*additions, True, shape == "both")
    torch.library.opcheck(getattr(torch.ops.ssl_kernels.contrastive_bwd, backend), call, test_utils=tests[:2])
