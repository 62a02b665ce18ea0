"""`sigmoid_pairs` on every backend of the CPU: its numbers judged by float64, and its operators."""

import itertools
import math

import pytest
import torch

from ssl_kernels.ops.sigmoid_pairs import sigmoid_pairs
from ssl_kernels.reference.sigmoid_pairs import sigmoid_pairs as reference
from tests.helpers import BACKENDS, DTYPES, OPERATORS, run_python, same_bits
from tests.support.sigmoid_pairs import (
    NAMES,
    check_against_float64,
    check_results,
    leaves_of,
    on_backend,
    random_call,
    results,
)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_operator = pytest.mark.parametrize("backend", OPERATORS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# Rows, columns, width, diagonal. The CPU kernel makes one tile up to 256 rows and columns, blocks of 64 to 256 beyond.
SHAPES = [
    (1, 1, 1, 0),
    (1, 1, 5, 1),
    (7, 7, 33, 0),
    (67, 1, 8, -3),
    (61, 139, 40, 64),
    (257, 257, 17, 0),
    (300, 520, 31, -290),
    (300, 520, 16, 500),
]


@pytest.mark.parametrize("diagonal", [-5, -2, 0, 1, 3, 9])
@pytest.mark.parametrize("n, m", [(4, 4), (2, 5), (5, 3), (1, 1)])
def test_reference_is_the_definition(n, m, diagonal):
    call = random_call(n, m, 3, torch.float64, diagonal=diagonal, scale=2.5, bias=-0.5, spread=0.3)
    losses = reference(*leaves_of(call), **call.options)
    for i in range(n):
        expected = 0
        for j in range(m):
            x, y = call.rows[i].tolist(), call.columns[j].tolist()
            cosine = sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))
            sign = 1 if j == i + diagonal else -1
            expected += math.log(1 + math.exp(-sign * (2.5 * cosine - 0.5)))
        assert losses[i].item() == pytest.approx(expected, rel=1e-13)
    assert reference(*leaves_of(call), **call.options | {"total": True}).item() == pytest.approx(
        math.fsum(losses.tolist())
    )


@every_backend
@every_dtype
@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("n, m, d, diagonal", SHAPES)
def test_matches_float64(backend, dtype, n, m, d, diagonal, total):
    check_against_float64(backend, random_call(n, m, d, dtype, diagonal=diagonal, total=total))


@every_backend
@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize(
    "scale, bias", [(0.0, 0.0), (0.0, -3.0), (-10.0, 4.0), (1e3, -10.0), (117.0, -12.9), (1e-3, 30.0)]
)
def test_matches_float64_at_every_scale_and_bias(backend, scale, bias, total):
    check_against_float64(backend, random_call(70, 66, 24, scale=scale, bias=bias, total=total))


@every_backend
@pytest.mark.parametrize("normalize", list(itertools.product([False, True], repeat=2)))
def test_rows_of_any_length(backend, normalize):
    """Unnormalised rows: logits from −1e3 to 1e3."""
    names = dict(zip(("normalize_rows", "normalize_columns"), normalize, strict=True))
    for total in (False, True):
        check_against_float64(backend, random_call(65, 70, 12, spread=1.0, total=total, **names))


@every_backend
def test_losses_of_far_negatives_keep_their_digits(backend):
    """At bias −30 a negative pair costs 1e-13: log(1 + e) in float32 would be 0."""
    rows, columns = torch.eye(40)[:20], torch.eye(40)[20:]
    scale, bias = torch.tensor(1.0), torch.tensor(-30.0)
    losses = sigmoid_pairs(rows, columns, scale, bias, diagonal=20, backend=backend)
    assert losses.tolist() == pytest.approx([20 * math.log1p(math.exp(-30))] * 20, rel=3e-6)
    leaf = bias.clone().requires_grad_()
    for total in (False, True):
        value = sigmoid_pairs(rows, columns, scale, leaf, diagonal=20, total=total, backend=backend).sum()
        (grad,) = torch.autograd.grad(value, leaf)
        assert grad.item() == pytest.approx(400 / (1 + math.exp(30)), rel=3e-6)


@pytest.mark.parametrize("ids", ["left out", "positive"])
def test_reference_with_ids_is_the_definition(ids):
    call = random_call(9, 14, 3, torch.float64, scale=2.5, bias=-0.5, diagonal=2, ids=ids)
    losses = reference(*leaves_of(call), **call.options)
    for i in range(9):
        expected = 0
        for j in range(14):
            x, y = call.rows[i].tolist(), call.columns[j].tolist()
            cosine = sum(a * b for a, b in zip(x, y, strict=True)) / (math.hypot(*x) * math.hypot(*y))
            equal = call.row_ids[i] == call.column_ids[j]
            positive = equal if ids == "positive" else j == i + 2
            if positive or not equal:
                expected += math.log(1 + math.exp((-1 if positive else 1) * (2.5 * cosine - 0.5)))
        assert losses[i].item() == pytest.approx(expected, rel=1e-13)


@every_backend
@every_dtype
@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("ids", ["left out", "positive"])
def test_ids_match_float64(backend, dtype, ids, total):
    shapes = [(1, 1, 5, 0), (61, 139, 40, 64), *[(300, 520, 31, -290)] * (backend == "native")]
    for n, m, d, diagonal in shapes:
        call = random_call(n, m, d, dtype, diagonal=diagonal, total=total, ids=ids, bias=-3.0)
        check_against_float64(backend, call)


@every_backend
@pytest.mark.parametrize("total", [False, True])
def test_of_equal_ids_the_diagonal_alone_stays(backend, total):
    """All ids alike: the positive pair and nothing else; and NaN of what is left out reaches no loss."""
    call = random_call(70, 66, 8, torch.float64, total=total)
    same = {"row_ids": torch.zeros(70, dtype=torch.long), "column_ids": torch.zeros(66, dtype=torch.long)}
    found = results(on_backend(backend), call.replace(**same))["losses"]
    x, y = (torch.nn.functional.normalize(rows, dim=1) for rows in (call.rows[:66], call.columns))
    expected = torch.zeros(70, dtype=torch.float64)
    expected[:66] = torch.nn.functional.softplus(8 - 10 * (x * y).sum(1))
    torch.testing.assert_close(found, expected.sum() if total else expected)
    call.columns[3] = torch.nan
    found = sigmoid_pairs(*leaves_of(call), **call.options | same | {"total": False}, backend=backend)
    assert found.isnan().nonzero().flatten().tolist() == [3]


@every_backend
@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("diagonal", [0, 2])
def test_gradcheck(backend, total, diagonal):
    call = random_call(4, 5, 3, torch.float64, scale=3.0, bias=-1.0, diagonal=diagonal, total=total)
    for wanted in ((0,), (1,), (2,), (3,), (0, 1, 2, 3)):
        leaves = [leaf.detach().requires_grad_(k in wanted) for k, leaf in enumerate(leaves_of(call))]
        assert torch.autograd.gradcheck(lambda *a: on_backend(backend)(*a, **call.options), leaves)


@every_backend
@pytest.mark.parametrize("total", [False, True])
def test_zero_rows_and_equal_rows(backend, total):
    call = random_call(66, 66, 8, total=total)
    call.rows[3] = 0
    call.columns[5:20] = call.columns[4]
    check_against_float64(backend, call)


@every_backend
@pytest.mark.parametrize("total", [False, True])
def test_nan_reaches_what_meets_it(backend, total):
    call = random_call(300, 270, 8, total=total)
    call.rows[280, 2] = torch.nan
    found = results(on_backend(backend), call)
    if total:
        assert found["losses"].isnan()
    else:
        assert found["losses"].isnan().nonzero().flatten().tolist() == [280]
    assert found["grad_rows"][280].isnan().all()
    assert not found["grad_rows"][:280].isnan().any()
    assert found["grad_columns"].isnan().all()
    assert found["grad_scale"].isnan() and found["grad_bias"].isnan()


@every_backend
def test_nan_scale_or_bias_reaches_everything(backend):
    for option in ("scale", "bias"):
        call = random_call(5, 6, 3, **{option: math.nan})
        found = results(on_backend(backend), call)
        assert all(tensor.isnan().all() for tensor in found.values())


@every_operator
def test_any_strides(backend):
    call = random_call(40, 44, 6)
    wide = torch.randn(40, 2, 9)
    wide[:, 1, 3:] = call.rows
    for rows in (wide[:, 1, 3:], call.rows.T.contiguous().T, call.rows[:1].expand(40, 6)):
        check_against_float64(backend, call.replace(rows=rows))


@every_backend
@pytest.mark.parametrize("total", [False, True])
def test_repeated_calls_are_equal_bit_for_bit(backend, total):
    call = random_call(600, 530, 40, total=total)
    first = results(on_backend(backend), call)
    for _ in range(3):
        again = results(on_backend(backend), call)
        assert all(same_bits(first[name], again[name]) for name in NAMES)


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads(threads, set_threads):
    set_threads(threads)
    for n, m, d in ((200, 190, 40), (600, 530, 40), (40, 900, 40), (150, 140, 260)):
        for ids in (None, "left out", "positive"):
            check_against_float64("native", random_call(n, m, d, total=True, ids=ids))


SAVE_RESULTS = """
import sys, torch
from ssl_kernels import _C
from tests.ops.test_sigmoid_pairs import instruction_set_calls
from tests.support.sigmoid_pairs import on_backend, results
assert _C.build_info()["cpu_instruction_set"] == sys.argv[1]
torch.save([results(on_backend("native"), call) for call in instruction_set_calls()], sys.argv[2])
"""


def instruction_set_calls():
    for dtype, total, bias in itertools.product(DTYPES, [False, True], [-20.0, 3.0]):
        ids = {-20.0: "left out", 3.0: "positive"}[bias] if total else None
        yield random_call(
            70, 83, 37, dtype, total=total, bias=bias, spread=0.5, normalize_rows=False, ids=ids
        )


@pytest.mark.parametrize("instruction_set", [pytest.param("portable", marks=pytest.mark.slow), "avx2"])
def test_narrower_instruction_sets(instruction_set, tmp_path):
    if instruction_set == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the processor has no AVX2")
    run_python(SAVE_RESULTS, instruction_set, str(tmp_path / "results"), SSL_KERNELS_CPU=instruction_set)
    for call, found in zip(instruction_set_calls(), torch.load(tmp_path / "results"), strict=True):
        check_results(found, call, instruction_set)


# The operators


def forward_operator(backend):
    return getattr(torch.ops.ssl_kernels.sigmoid_pairs_fwd, backend)


def backward_operator(backend):
    return getattr(torch.ops.ssl_kernels.sigmoid_pairs_bwd, backend)


@every_operator
@pytest.mark.parametrize("ids", ["left out", "positive"])
def test_opcheck_with_ids(backend, ids):
    call = random_call(7, 9, 5, torch.bfloat16, ids=ids)
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    for total in (False, True):
        arguments = (*call.operands, total, True, True, True, *call.marks)
        torch.library.opcheck(forward_operator(backend), arguments, test_utils=tests)
    arguments = (call.cotangent, *call.operands, True, True, *call.marks)
    torch.library.opcheck(backward_operator(backend), arguments, test_utils=tests)


@every_operator
def test_opcheck(backend):
    call = random_call(7, 9, 5, torch.bfloat16)
    for total, keep, needs in [
        (True, True, (True, True)),
        (True, True, (False, False)),
        (False, True, (True, True)),
        (True, False, (True, True)),
    ]:
        torch.library.opcheck(forward_operator(backend), (*call.operands, total, keep, *needs))
    for needs in ((True, True), (False, False)):
        torch.library.opcheck(backward_operator(backend), (call.cotangent, *call.operands, *needs))


@every_operator
def test_nothing_is_made_without_a_gradient(backend):
    for total, keep in ((True, False), (False, True), (False, False)):
        made = forward_operator(backend)(*random_call(5, 6, 3).operands, total, keep, True, True)[1:]
        assert [grad.numel() for grad in made] == [0, 0, 0, 0]
    made = forward_operator(backend)(*random_call(5, 6, 3).operands, True, True, False, True)[1:]
    assert [grad.numel() for grad in made] == [0, 18, 1, 1]


@pytest.mark.filterwarnings("ignore")
@every_backend
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("total", [False, True])
def test_compiles_without_a_graph_break(backend, dynamic, total):
    torch._dynamo.reset()
    compiled = torch.compile(on_backend(backend), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (6, 11) if dynamic else (6,):
        call = random_call(n, 9, 8, total=total)
        eager, found = results(on_backend(backend), call), results(compiled, call)
        for name in NAMES:
            torch.testing.assert_close(found[name], eager[name], rtol=1e-6, atol=1e-6)


@every_backend
@every_dtype
@pytest.mark.parametrize("total", [False, True])
def test_autocast_changes_nothing(backend, dtype, total):
    call = random_call(70, 66, 24, dtype, total=total)
    expected = results(on_backend(backend), call)

    def under_autocast(*operands, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return sigmoid_pairs(*operands, backend=backend, **options)

    found = results(under_autocast, call)
    assert all(same_bits(found[name], expected[name]) for name in NAMES)


@every_operator
@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("twice", range(4))
def test_second_derivative_is_an_error(backend, total, twice):
    call = random_call(6, 5, 4, total=total)
    leaves = leaves_of(call)
    losses = on_backend(backend)(*leaves, **call.options)
    (grad,) = torch.autograd.grad(losses, leaves[twice], call.cotangent, create_graph=True)
    with pytest.raises(
        RuntimeError, match=f'"{backend}" has no second derivative; backend="reference" has one'
    ):
        torch.autograd.grad(grad.sum(), leaves[twice])


@every_operator
@pytest.mark.parametrize("total", [False, True])
def test_backward_can_run_twice(backend, total):
    call = random_call(70, 66, 8, total=total)
    leaves = leaves_of(call)
    losses = on_backend(backend)(*leaves, **call.options)
    first = torch.autograd.grad(losses, leaves, call.cotangent, retain_graph=True)
    second = torch.autograd.grad(losses, leaves, call.cotangent)
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


@every_operator
@pytest.mark.parametrize("total", [False, True])
def test_overwritten_input_is_noticed_before_backward(backend, total):
    call = random_call(6, 6, 4, total=total)
    rows, *others = leaves_of(call)
    activations = rows * 1
    losses = on_backend(backend)(activations, *others, **call.options)
    activations.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.sum().backward()


@pytest.mark.parametrize("change, message", [
    ({"rows": torch.zeros(4)}, "rows must be 2-d"),
    ({"rows": torch.zeros(0, 3)}, "must not be empty"),
    ({"columns": torch.zeros(5, 2)}, "columns must have the width"),
    ({"columns": torch.zeros(5, 3, dtype=torch.float64)}, "columns must have the width, dtype"),
    ({"columns": torch.zeros(0, 3)}, "must not be empty"),
    ({"scale": torch.zeros(2)}, "scale must be one number"),
    ({"scale": torch.zeros((), dtype=torch.float64)}, "scale must be one number of dtype Float"),
    ({"bias": torch.zeros(0)}, "bias must be one number"),
    ({"row_ids": torch.zeros(3).long(), "column_ids": torch.zeros(5).long()}, "row_ids must be int64 of shape"),
    ({"row_ids": torch.zeros(4).long(), "column_ids": torch.zeros(5)}, "column_ids must be int64 of shape"),
    ({"row_ids": torch.zeros(4).long()}, "row_ids and column_ids go together"),
    ({"equal_ids_are_positive": True}, "row_ids must be given with equal_ids_are_positive"),
    ({"grad_losses": torch.zeros(3, dtype=torch.float64)}, "grad_losses must be float64 of shape"),
    ({"grad_losses": torch.zeros(4)}, "grad_losses must be float64 of shape"),
])  # fmt: skip
def test_native_operator_refuses_what_it_would_read_out_of_bounds(change, message):
    named = {
        "grad_losses": torch.zeros(4, dtype=torch.float64),
        "rows": torch.zeros(4, 3),
        "columns": torch.zeros(5, 3),
        "scale": torch.tensor(1.0),
        "bias": torch.tensor(1.0),
    } | change
    names = ("row_ids", "column_ids", "equal_ids_are_positive")
    ids = {name: named.pop(name) for name in names if name in named}
    with pytest.raises(RuntimeError, match=message):
        backward_operator("native")(*named.values(), 0, True, True, True, True, **ids)
    if "grad_losses" not in change:
        with pytest.raises(RuntimeError, match=message):
            forward_operator("native")(*[*named.values()][1:], 0, True, True, True, True, True, True, **ids)
