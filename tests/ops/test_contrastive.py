"""`contrastive` on every backend of the CPU: its numbers, judged by float64 as tests/support says."""

import math

import pytest
import torch

from ssl_kernels.ops.contrastive import contrastive
from ssl_kernels.reference.contrastive import contrastive as reference
from tests.helpers import BACKENDS, DTYPES, OPERATORS, random_rows
from tests.support.contrastive import (
    check_against_float64,
    on_backend,
    random_call,
    results_and_gradients,
)

TEMPERATURES = (1e-4, 5e-3, 0.05, 0.5, 1e3)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# The reference in float32 is the plain PyTorch that the others are held to: the larger sweeps leave it out.
every_operator = pytest.mark.parametrize("backend", OPERATORS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Rows, columns (None: square), width. The CPU kernel makes one tile of few products up to 256 rows and columns, and
# cuts blocks of 64 to 256 beyond; it keeps logits from D = 32 on.
SHAPES = [
    (1, None, 1),
    (2, None, 3),
    (7, None, 33),
    (65, None, 31),
    (131, None, 64),
    (1, 1, 5),
    (1, 67, 33),
    (67, 1, 8),
    (61, 139, 40),
    (257, 66, 17),
]
LARGE_SHAPES = [(257, None, 128), (641, None, 32), (1031, None, 48), (300, 1027, 129), (1027, 300, 16)]


@pytest.mark.parametrize("n, m", [(3, None), (3, 4), (5, 2)])
@pytest.mark.parametrize("with_ids", [False, True])
def test_reference_is_the_definition(n, m, with_ids):
    call = random_call(n, m, 4, torch.float64, temperature=0.7, positives=2, spread=0.5)
    call.both_directions = m is not None
    call.keep_diagonal = with_ids and m is not None
    columns = n if m is None else m
    if with_ids:
        call.row_ids = torch.arange(n) % 2
        call.column_ids = None if m is None else torch.arange(m) % 2
    lse, column_lse, positive_logits = reference(call.rows, call.columns, call.scale, **call.options)

    x, y = call.rows.tolist(), (call.rows if m is None else call.columns).tolist()
    dot = lambda a, b: sum(p * q for p, q in zip(a, b, strict=True))  # noqa: E731
    cosine = lambda a, b: dot(a, b) / math.sqrt(dot(a, a) * dot(b, b))  # noqa: E731
    logits = {(i, j): cosine(x[i], y[j]) / 0.7 for i in range(n) for j in range(columns)}

    def allowed(i, j):
        if i == j and (m is None or call.keep_diagonal):
            return m is not None
        return not with_ids or i % 2 != j % 2

    for i in range(n):
        total = sum(math.exp(logits[i, j]) for j in range(columns) if allowed(i, j))
        assert lse[i].item() == pytest.approx(math.log(total) if total else -math.inf, rel=1e-13)
        for k in range(2):
            assert positive_logits[i, k].item() == pytest.approx(
                logits[i, call.positives[i, k].item() % columns]
            )
    for j in range(columns if call.both_directions else 0):
        total = sum(math.exp(logits[i, j]) for i in range(n) if allowed(i, j))
        assert column_lse[j].item() == pytest.approx(math.log(total) if total else -math.inf, rel=1e-13)


@every_backend
@every_dtype
@pytest.mark.parametrize("n, m, d", SHAPES)
def test_matches_float64(backend, dtype, n, m, d):
    check_against_float64(backend, random_call(n, m, d, dtype, both_directions=m is not None))


@pytest.mark.slow
@every_backend
@every_dtype
@pytest.mark.parametrize("n, m, d", LARGE_SHAPES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_matches_float64_at_large_sizes(backend, dtype, n, m, d, temperature):
    options = {"both_directions": m is not None, "ids": 5, "positives": 3, "temperature": temperature}
    check_against_float64(backend, random_call(n, m, d, dtype, **options))


@every_operator
@pytest.mark.parametrize("n, m, d", LARGE_SHAPES)
def test_matches_float64_across_many_tiles(backend, n, m, d):
    for temperature in (0.02, 0.2):  # running maximum, fixed shift
        check_against_float64(
            backend, random_call(n, m, d, temperature=temperature, both_directions=m is not None)
        )


@every_operator
@every_dtype
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("n, m", [(70, None), (39, 83)])
def test_matches_float64_at_every_temperature(backend, dtype, temperature, n, m):
    check_against_float64(
        backend, random_call(n, m, 24, dtype, temperature=temperature, both_directions=m is not None)
    )


@every_backend
@pytest.mark.parametrize("scale", [0.0, -1.0, -40.0, -1e4, 1e-6])
@pytest.mark.parametrize("m", [None, 50])
def test_scale_may_be_any_number(backend, scale, m):
    call = random_call(71, m, 16)
    call.scale.fill_(scale)
    check_against_float64(backend, call)


@every_operator
@every_dtype
@pytest.mark.parametrize("temperature", [0.01, 0.2])
def test_raw_rows_of_uneven_length(backend, dtype, temperature):
    """Logits of all sizes: the maxima of rows, of columns and of tiles lie far apart."""
    options = {"normalize_rows": False, "normalize_columns": False, "temperature": temperature, "spread": 1.0}
    check_against_float64(backend, random_call(270, None, 8, dtype, **options))
    check_against_float64(backend, random_call(90, 270, 8, dtype, both_directions=True, **options))


@every_backend
@pytest.mark.parametrize("size", [1e-8, 1e4])
def test_raw_rows_huge_and_tiny(backend, size):
    for call in (random_call(270, None, 12, temperature=1.0), random_call(40, 66, 12, temperature=1.0)):
        call.rows *= size
        call.normalize_rows = call.normalize_columns = False
        check_against_float64(backend, call)


@every_backend
@pytest.mark.parametrize("normalize_rows, normalize_columns", [(True, False), (False, True)])
def test_either_side_alone_may_be_normalized(backend, normalize_rows, normalize_columns):
    options = {"normalize_rows": normalize_rows, "normalize_columns": normalize_columns, "spread": 0.5}
    check_against_float64(backend, random_call(33, 70, 9, temperature=1.0, both_directions=True, **options))


@every_operator
@pytest.mark.parametrize("temperature", [0.02, 0.5])
@pytest.mark.parametrize("n, m", [(70, None), (270, None), (300, 67), (67, 300)])
@pytest.mark.parametrize("keep_diagonal", [False, True])
@pytest.mark.parametrize("both_directions", [False, True])
def test_equal_ids_are_left_out(backend, temperature, n, m, keep_diagonal, both_directions):
    if m is None and (keep_diagonal or both_directions):
        m = n  # the flags mean nothing in the square case
    options = {"keep_diagonal": keep_diagonal, "both_directions": both_directions, "temperature": temperature}
    check_against_float64(backend, random_call(n, m, 16, ids=3, **options))


@every_operator
@pytest.mark.parametrize("n, m", [(70, None), (270, None), (70, 65), (270, 65)])
def test_rows_with_nothing_allowed(backend, n, m):
    """Their lse is -inf and they neither give nor get a gradient through it; their positives still do."""
    for temperature in (0.02, 0.5):
        call = random_call(n, m, 8, temperature=temperature, both_directions=m is not None)
        call.row_ids = torch.zeros(n, dtype=torch.int64)
        if m is not None:
            call.column_ids = torch.zeros(m, dtype=torch.int64)
            call.row_ids[:5] = 9  # meet every column but one
            call.column_ids[3] = 9  # meets every row but five
        else:
            call.row_ids[5:9] = torch.tensor([1, 1, 2, 2])
        check_against_float64(backend, call)


@every_backend
def test_nothing_allowed_at_all(backend):
    z = random_rows(70, 6).requires_grad_()
    lse = contrastive(z, None, torch.tensor(3.0), row_ids=torch.full((70,), -7), backend=backend).lse
    assert (lse == -torch.inf).all()
    lse.sum().backward()
    assert (z.grad == 0).all()


@every_backend
def test_one_row_has_no_other(backend):
    result = contrastive(
        random_rows(1, 4), None, torch.tensor(2.0), positives=torch.tensor([0]), backend=backend
    )
    assert result.lse.tolist() == [-math.inf]
    assert result.positive_logits.item() == pytest.approx(2.0)


@every_operator
@pytest.mark.parametrize("m", [None, 266])
@pytest.mark.parametrize("positives_per_row", [1, 2, 5])
def test_many_positives(backend, m, positives_per_row):
    check_against_float64(backend, random_call(270, m, 12, positives=positives_per_row))


@every_backend
@pytest.mark.parametrize("m", [None, 66])
def test_repeated_positives_add_up(backend, m):
    call = random_call(270, m, 12)
    columns = 270 if m is None else m
    call.positives = torch.full((270, 4), 3)
    call.positives[:, 1] = 3 - columns  # the same column, from the end
    call.positives[:, 2] = columns - 1
    check_against_float64(backend, call)


@every_backend
def test_positives_may_be_the_diagonal_and_left_out_entries(backend):
    call = random_call(270, None, 12, ids=2)
    call.positives = torch.stack((torch.arange(270), torch.arange(270).roll(2)), 1)
    check_against_float64(backend, call)


@every_backend
def test_one_column_of_positives_is_one_positive(backend):
    call = random_call(66, 35, 8)
    flat = results_and_gradients(on_backend(backend), call)
    call.positives = call.positives[:, None]
    columned = results_and_gradients(on_backend(backend), call)
    assert columned["positive_logits"].shape == (66, 1)
    assert torch.equal(columned["positive_logits"][:, 0], flat["positive_logits"])
    assert torch.equal(columned["grad_columns"], flat["grad_columns"])


@every_backend
@pytest.mark.parametrize("m", [None, 40])
def test_without_positives(backend, m):
    check_against_float64(backend, random_call(67, m, 12, positives=0, both_directions=m is not None))


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides(backend, dtype):
    wide = random_rows(140, 90, dtype)
    layouts = {
        "transposed": random_rows(17, 70, dtype).T,
        "every other row": wide[::2, :17],
        "every other column": wide[:70, 1:35:2],
        "every other of both": wide[::2, ::5],
        "expanded rows": random_rows(1, 17, dtype).expand(70, 17),
        "expanded columns": random_rows(70, 1, dtype).expand(70, 17),
        "one column": wide[:70, 3:4],
    }
    for layout, rows in layouts.items():
        assert not rows.is_contiguous(), layout
        for columns in (None, random_rows(66, rows.shape[1], dtype, seed=2).T.contiguous().T):
            call = random_call(70, None if columns is None else 66, rows.shape[1], dtype)
            call.rows, call.columns = rows, columns
            check_against_float64(backend, call)


@every_backend
def test_strided_positives_and_ids(backend):
    call = random_call(70, 66, 8, positives=2, ids=4)
    expected = results_and_gradients(on_backend(backend), call)
    call.positives = call.positives.T.contiguous().T
    call.row_ids = torch.stack((call.row_ids, call.row_ids + 1), 1)[:, 0]
    call.column_ids = torch.stack((call.column_ids, call.column_ids + 1), 1)[:, 0]
    assert not any(t.is_contiguous() for t in (call.positives, call.row_ids, call.column_ids))
    found = results_and_gradients(on_backend(backend), call)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n, m", [(70, None), (270, None), (70, 50)])
def test_zero_rows_and_rows_below_eps(backend, dtype, n, m):
    """Rows shorter than 1e-12 are scaled by 1e12, and their gradient is not projected."""
    for temperature in (0.02, 0.5):
        call = random_call(n, m, 8, dtype, temperature=temperature)
        call.rows[3] = 0
        call.rows[69] = 0
        call.rows[40] *= 1e-14
        call.rows[41] *= 3e-12
        if m is not None:
            call.columns[7] = 0
            call.columns[8] *= 1e-13
        check_against_float64(backend, call)


@every_operator
@pytest.mark.parametrize("temperature", [1e-4, 0.05, 1.0])
def test_equal_rows(backend, temperature):
    call = random_call(270, None, 24, temperature=temperature)
    call.rows[:] = call.rows[0]
    check_against_float64(backend, call)
    lse = contrastive(call.rows, None, call.scale, backend=backend).lse
    torch.testing.assert_close(lse, torch.full_like(lse, 1 / temperature + math.log(269)), rtol=3e-7, atol=0)


@every_backend
@pytest.mark.parametrize("temperature", [1e-3, 0.5])
@pytest.mark.parametrize("m", [None, 66])
def test_gradients_of_one_output_alone(backend, temperature, m):
    """The other outputs' gradients never arrive: each is taken as zero."""
    call = random_call(270, m, 8, torch.float64, temperature=temperature, both_directions=m is not None)
    for wanted in (0, 2) if m is None else (0, 1, 2):
        expected, found = (
            _gradients_of(wanted, run, call) for run in (on_backend("reference"), on_backend(backend))
        )
        for gradient, truth in zip(found, expected, strict=True):
            torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-5)


def _gradients_of(wanted, run, call):
    operands = (call.rows, call.columns, call.scale)
    operands = [None if t is None else t.clone().requires_grad_() for t in operands]
    result = run(*operands, **call.options)[wanted]
    leaves = [t for t in operands if t is not None]
    grads = torch.autograd.grad(result, leaves, call.upstream()[wanted], allow_unused=True)
    return [torch.zeros_like(t) if grad is None else grad for t, grad in zip(leaves, grads, strict=True)]


@every_backend
@pytest.mark.parametrize("m", [None, 66])
@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_gradients_only_where_asked(backend, m, temperature):
    call = random_call(270, m, 40, temperature=temperature)
    everything = results_and_gradients(on_backend(backend), call)
    operands = {"grad_rows": call.rows, "grad_columns": call.columns, "grad_scale": call.scale}
    operands = {name: operand for name, operand in operands.items() if operand is not None}
    for wanted in operands:
        given = {name: t.clone().requires_grad_(name == wanted) for name, t in operands.items()}
        result = contrastive(
            given["grad_rows"],
            given.get("grad_columns"),
            given["grad_scale"],
            backend=backend,
            **call.options,
        )
        seeds = [seed for seed in call.upstream() if seed is not None]
        torch.autograd.backward([out for out in result if out.numel()], seeds)
        for name, operand in given.items():
            assert (operand.grad is not None) == (name == wanted)
        expected = everything[wanted]
        torch.testing.assert_close(
            given[wanted].grad, expected, rtol=1e-5, atol=3e-6 * expected.abs().max().item()
        )


@every_backend
@pytest.mark.parametrize("scale", [2.0, 100.0])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("m", [None, 66])
def test_nan_and_inf_propagate(backend, scale, poison, normalize, m):
    """Where plain PyTorch's numbers are not finite, the backend's are not; the others are the same numbers."""
    call = random_call(
        70, m, 8, normalize_rows=normalize, normalize_columns=normalize, both_directions=m is not None
    )
    call.scale.fill_(scale)
    call.rows[66, 3] = poison
    expected = results_and_gradients(reference, call)
    found = results_and_gradients(on_backend(backend), call)
    assert not expected["lse"][66].isfinite()
    for name in ("lse", "positive_logits", *(["column_lse"] if m else [])):
        finite = expected[name].isfinite()
        assert torch.equal(found[name].isfinite(), finite), name
        torch.testing.assert_close(found[name][finite].float(), expected[name][finite], rtol=1e-5, atol=1e-4)
    assert not found["grad_rows"][66].isfinite().any()
    assert not found["grad_scale"].isfinite()


@every_backend
@pytest.mark.parametrize("scale", [2.0, 100.0])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00123, -1, 0x7F800001])
def test_nan_of_any_bit_pattern_propagates(backend, scale, normalize, bits):
    z = random_rows(70, 8)
    z[5, 3] = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
    assert (
        contrastive(z, None, torch.tensor(scale), normalize_rows=normalize, backend=backend).lse.isnan().all()
    )


@every_backend
def test_nan_in_scale_propagates(backend):
    for bits in (0x7FFFFFFF, 0x7FC00000):
        scale = torch.tensor([bits], dtype=torch.int32).view(torch.float32)[0]
        result = contrastive(random_rows(70, 8), None, scale, positives=torch.arange(70), backend=backend)
        assert result.lse.isnan().all()
        assert result.positive_logits.isnan().all()


@every_backend
def test_small_loss_at_small_temperature_keeps_its_digits(backend):
    """lse and logits of 1e4 differ by 1e-3: the difference is that of the operator's own logits."""
    z = random_rows(64, 16).repeat(2, 1)
    partner = torch.arange(-64, 64)
    result = contrastive(z, None, torch.tensor(1e4), positives=partner, backend=backend)
    loss = result.lse - result.positive_logits
    assert loss.max() < 1e-2
    assert loss.min() > (-1e-2 if backend != "native" else -1e-9)


@every_backend
@pytest.mark.parametrize("n, m", [(5, None), (4, 6), (66, None)])
def test_gradcheck(backend, n, m):
    call = random_call(n, m, 3, torch.float64, temperature=0.4, positives=2, ids=3, spread=0.3)
    call.row_ids[0] = 17  # a row that keeps all its columns
    call.both_directions = call.keep_diagonal = m is not None
    for normalize in (True, False):
        call.normalize_rows = call.normalize_columns = normalize

        def run(rows, scale, columns=None, backend=backend, options=call.options):
            results = contrastive(rows, columns, scale, backend=backend, **options)
            return [torch.where(result == -torch.inf, 0, result) for result in results if result.numel()]

        tensors = [call.rows, call.scale, *([] if m is None else [call.columns])]
        assert torch.autograd.gradcheck(run, [t.clone().requires_grad_() for t in tensors], fast_mode=n > 5)


def test_reference_differentiates_twice():
    call = random_call(5, None, 3, torch.float64, temperature=0.4)

    def run(rows, scale):
        lse, _, positive_logits = contrastive(
            rows, None, scale, positives=call.positives, backend="reference"
        )
        return lse, positive_logits

    assert torch.autograd.gradgradcheck(run, [t.clone().requires_grad_() for t in (call.rows, call.scale)])


@every_backend
def test_results_are_new_memory(backend):
    """Writing into a result changes no input, and backward does not read what the caller may overwrite."""
    call = random_call(66, None, 40)
    z = call.rows.clone().requires_grad_()
    result = contrastive(z, None, call.scale, positives=call.positives, backend=backend)
    expected = torch.autograd.grad(result.lse.sum(), z, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(result.lse.sum(), z)[0], expected)
    assert torch.equal(z.detach(), call.rows)
