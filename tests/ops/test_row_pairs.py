"""`row_pairs` on every backend of the CPU: its numbers judged by float64, its derivatives, and its operators."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_kernels.ops.row_pairs import MEASURES, row_pairs
from ssl_kernels.recipes.memory import peak_memory
from ssl_kernels.reference.row_pairs import row_pairs as reference
from tests.helpers import BACKENDS, DTYPES, OPERATORS, random_rows, run_python, same_bits, saved_bytes
from tests.support.row_pairs import Call, check_results, errors, random_call, results, term_sums

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_operator = pytest.mark.parametrize("backend", OPERATORS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_measure = pytest.mark.parametrize("measure", MEASURES)
normalized_or_not = pytest.mark.parametrize("normalize", [True, False])
pair_or_triplet = pytest.mark.parametrize("triplet", [False, True])
SHAPES = [(1, 1), (1, 7), (5, 33), (64, 128), (301, 96)]  # N, D; the CPU kernel gives a thread 16384 elements


def on_backend(backend):
    return lambda *operands, **options: row_pairs(*operands, backend=backend, **options)


def check_against_float64(backend, call):
    check_results(results(on_backend(backend), call), call, backend)


@pytest.mark.parametrize("normalize, measure", list(itertools.product([True, False], MEASURES)))
def test_reference_is_the_definition(normalize, measure):
    call = random_call(4, 3, torch.float64, normalize=normalize, measure=measure)
    values = reference(*call.operands, normalize, measure)

    def unit(row):
        return [a / math.hypot(*row) for a in row] if normalize else row

    def measured(a, b):
        if measure == "product":
            return math.sumprod(a, b) if hasattr(math, "sumprod") else sum(map(float.__mul__, a, b))
        return math.dist(a, b)

    for i in range(4):
        x, y, z = (unit(rows[i].tolist()) for rows in call.operands)
        assert values[i].item() == pytest.approx(measured(x, y) - measured(x, z), rel=1e-13)


@every_backend
@every_dtype
@every_measure
@normalized_or_not
@pair_or_triplet
@pytest.mark.parametrize("n, d", SHAPES)
def test_matches_float64(backend, dtype, measure, normalize, triplet, n, d):
    call = random_call(n, d, dtype, triplet=triplet, normalize=normalize, measure=measure)
    check_against_float64(backend, call)


@every_backend
@given(
    n=st.integers(1, 40),
    d=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    triplet=st.booleans(),
    normalize=st.booleans(),
    measure=st.sampled_from(MEASURES),
    spread=st.sampled_from([0.0, 1.0, 2.0]),
)
def test_any_call_matches_float64(backend, n, d, dtype, triplet, normalize, measure, spread):
    if dtype == torch.float16:
        spread = min(spread, 1.0)
    call = random_call(n, d, dtype, triplet=triplet, normalize=normalize, measure=measure, spread=spread)
    check_against_float64(backend, call)


@every_backend
@every_measure
@normalized_or_not
@pair_or_triplet
def test_gradcheck(backend, measure, normalize, triplet):
    call = random_call(4, 3, torch.float64, triplet=triplet, normalize=normalize, measure=measure)
    count = len(call.operands)
    for wanted in (*({k} for k in range(count)), {0, 1}, set(range(count))):
        leaves = [rows.clone().requires_grad_(k in wanted) for k, rows in enumerate(call.operands)]
        assert torch.autograd.gradcheck(lambda *rows: on_backend(backend)(*rows, **call.options), leaves)


@every_backend
@every_measure
@every_dtype
def test_short_rows_are_only_scaled(backend, measure, dtype):
    """As F.normalize differentiates them: zero rows and, where the dtype has them, rows shorter than 1e-12."""
    call = random_call(6, 5, dtype, measure=measure)
    call.x[0] = 0
    call.y[1] = 0
    call.z[2] = 0
    if dtype != torch.float16:
        call.x[3] *= 3e-14
        call.y[4] *= 3e-14
    truth = results(reference, call.with_operands(torch.Tensor.double))
    for ours, expected in zip(results(on_backend(backend), call), truth, strict=True):
        eps = torch.finfo(ours.dtype).eps if ours.dtype != torch.float64 else 0
        tolerance = 4 * eps + 1e-6 * (dtype != torch.float64) + 1e-12
        size = expected.abs() if expected.dim() == 1 else expected.norm(dim=1, keepdim=True)
        expected = expected.to(ours.dtype).double()  # float16 has no 1e12
        where = expected.isfinite()
        assert ((ours.double() - expected).abs() <= tolerance * (1 + size))[where].all()
        assert torch.equal(ours.double()[~where], expected[~where])


@every_operator
@every_dtype
@normalized_or_not
def test_equal_rows_have_distance_and_gradient_zero(backend, dtype, normalize):
    """Normalised rows are rounded before they are subtracted: no multiply-add is fused."""
    x = random_rows(50, 37, dtype)
    call = Call(x, x.clone(), None, normalize, "distance")
    values, *grads = results(on_backend(backend), call)
    assert not values.any() and not any(grad.any() for grad in grads)


@every_operator
def test_near_rows_keep_their_distance(backend):
    """Far below what |x|² + |y|² − 2 <x, y> would leave of it in float32."""
    x = random_rows(40, 24, torch.float32)
    y = x + 1e-5 * random_rows(40, 24, torch.float32, seed=1)
    values = row_pairs(x, y, normalize=False, measure="distance", backend=backend)
    torch.testing.assert_close(values, (x.double() - y).norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("factor", [1e-25, 1e25])
@pytest.mark.parametrize("which", [(0, 1, 2), (0,), (1,), (2,)], ids=["all", "x", "y", "z"])
@every_measure
@normalized_or_not
def test_squares_may_leave_the_range_of_float32(factor, which, measure, normalize):
    """On the native kernel of the CPU."""
    if measure == "product" and not normalize and len(which) == 3:
        pytest.skip("the product itself leaves it")
    call = random_call(20, 9, measure=measure, normalize=normalize)
    for k in which:
        call.operands[k].mul_(factor)
    truth = results(reference, call.with_operands(torch.Tensor.double))
    assert max(errors(results(on_backend("native"), call), truth, term_sums(call))) < 1e-6


@every_backend
@every_measure
@normalized_or_not
def test_nan_stays_in_its_row(backend, measure, normalize):
    for k in range(3):
        call = random_call(9, 4, measure=measure, normalize=normalize)
        call.operands[k][5, 2] = torch.nan
        for ours in results(on_backend(backend), call):
            bad = ours.isnan() if ours.dim() == 1 else ours.isnan().any(1)
            assert not bad[:5].any() and not bad[6:].any()
        assert results(on_backend(backend), call)[0].isnan()[5]


@every_operator
@every_measure
def test_any_strides(backend, measure):
    call = random_call(40, 6, measure=measure)
    wide = torch.randn(40, 2, 9)
    wide[:, 1, 3:] = call.x
    for rows in (wide[:, 1, 3:], call.x.T.contiguous().T, call.x[:1].expand(40, 6)):
        check_against_float64(backend, dataclasses.replace(call, x=rows, z=rows.flip(0)))


@every_backend
@every_measure
def test_repeated_calls_are_equal_bit_for_bit(backend, measure):
    call = random_call(600, 40, measure=measure)
    first = results(on_backend(backend), call)
    for _ in range(3):
        assert all(map(same_bits, first, results(on_backend(backend), call)))


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(threads, set_threads):
    call = random_call(2000, 40)
    first = results(on_backend("native"), call)
    set_threads(threads)
    assert all(map(same_bits, first, results(on_backend("native"), call)))


SAVE_RESULTS = """
import sys, torch
from ssl_kernels import _C
from tests.ops.test_row_pairs import instruction_set_calls, on_backend, results
assert _C.build_info()["cpu_instruction_set"] == sys.argv[1]
torch.save([results(on_backend("native"), call) for call in instruction_set_calls()], sys.argv[2])
"""


def instruction_set_calls():
    for dtype, measure in itertools.product(DTYPES, MEASURES):
        yield random_call(70, 37, dtype, measure=measure)


@pytest.mark.parametrize("instruction_set", [pytest.param("portable", marks=pytest.mark.slow), "avx2"])
def test_narrower_instruction_sets(instruction_set, tmp_path):
    if instruction_set == "avx2" and torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the processor has no AVX2")
    run_python(SAVE_RESULTS, instruction_set, str(tmp_path / "results"), SSL_KERNELS_CPU=instruction_set)
    for call, found in zip(instruction_set_calls(), torch.load(tmp_path / "results"), strict=True):
        check_results(found, call, instruction_set)


def test_memory_of_a_native_step_is_that_of_the_gradients():
    """bfloat16: rows in float32 would be twice as large as all that is allowed."""
    call = random_call(20000, 64, torch.bfloat16)
    leaves = [rows.requires_grad_() for rows in call.operands]

    def step():
        torch.autograd.grad(row_pairs(*leaves, backend="native", **call.options).sum(), leaves)

    assert peak_memory(step) < 3 * call.x.nbytes + 20000 * 100
    loss = on_backend("native")
    assert saved_bytes(loss, *leaves, **call.options) <= 3 * call.x.nbytes + 20000 * 40


# The operators


def forward_operator(backend):
    return getattr(torch.ops.ssl_kernels.row_pairs_fwd, backend)


def backward_operator(backend):
    return getattr(torch.ops.ssl_kernels.row_pairs_bwd, backend)


@every_operator
@every_measure
@pair_or_triplet
def test_opcheck(backend, measure, triplet):
    call = random_call(7, 5, torch.bfloat16, triplet=triplet, measure=measure)
    operands = (call.x, call.y, call.z)
    torch.library.opcheck(forward_operator(backend), (*operands, True, measure))
    leaves = [None if rows is None else rows.clone().requires_grad_() for rows in operands]
    if backend == "native":
        torch.library.opcheck(forward_operator(backend), (*leaves, True, measure))
    saved = forward_operator(backend)(*operands, True, measure)[1]
    for needs in itertools.product([False, True], repeat=3):
        if needs[2] and not triplet:
            continue
        torch.library.opcheck(
            backward_operator(backend), (call.cotangent, *operands, saved, True, measure, *needs)
        )


@every_operator
def test_only_wanted_gradients_are_made(backend):
    call = random_call(5, 3)
    saved = forward_operator(backend)(*call.operands, True, "distance")[1]
    assert saved.shape == (5, 2, 4)
    all_three = backward_operator(backend)(
        call.cotangent, *call.operands, saved, True, "distance", *[True] * 3
    )
    for needs in itertools.product([False, True], repeat=3):
        made = backward_operator(backend)(call.cotangent, *call.operands, saved, True, "distance", *needs)
        for grad, need, expected in zip(made, needs, all_three, strict=True):
            assert same_bits(grad, expected) if need else grad.numel() == 0


@pytest.mark.filterwarnings("ignore")
@every_backend
@every_measure
@pair_or_triplet
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(backend, measure, triplet, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(on_backend(backend), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (6, 11) if dynamic else (6,):
        call = random_call(n, 8, triplet=triplet, measure=measure)
        eager, found = results(on_backend(backend), call), results(compiled, call)
        for ours, expected in zip(found, eager, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@every_backend
@every_dtype
def test_autocast_changes_nothing(backend, dtype):
    call = random_call(30, 24, dtype)
    expected = results(on_backend(backend), call)

    def under_autocast(*operands, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return row_pairs(*operands, backend=backend, **options)

    assert all(map(same_bits, results(under_autocast, call), expected))


@every_operator
@pair_or_triplet
def test_second_derivative_is_an_error(backend, triplet):
    call = random_call(6, 4, triplet=triplet)
    for twice in range(len(call.operands)):
        leaves = [rows.clone().requires_grad_() for rows in call.operands]
        values = on_backend(backend)(*leaves, **call.options)
        (grad,) = torch.autograd.grad(values, leaves[twice], call.cotangent, create_graph=True)
        with pytest.raises(
            RuntimeError, match=f'"{backend}" has no second derivative; backend="reference" has one'
        ):
            torch.autograd.grad(grad.sum(), leaves[twice])


@every_measure
def test_second_derivative_of_the_reference_is_right(measure):
    call = random_call(3, 3, torch.float64, measure=measure)
    leaves = [rows.clone().requires_grad_() for rows in call.operands]
    assert torch.autograd.gradgradcheck(lambda *rows: on_backend("reference")(*rows, **call.options), leaves)


@every_operator
def test_forward_mode_is_an_error(backend):
    call = random_call(6, 4)
    with torch.autograd.forward_ad.dual_level():
        for k in range(3):
            operands = call.operands
            operands[k] = torch.autograd.forward_ad.make_dual(operands[k], torch.ones_like(operands[k]))
            with pytest.raises((NotImplementedError, RuntimeError), match=r"forward-mode|jvp"):
                row_pairs(*operands, backend=backend, **call.options)


@every_operator
def test_backward_can_run_twice(backend):
    call = random_call(70, 8)
    leaves = [rows.clone().requires_grad_() for rows in call.operands]
    values = on_backend(backend)(*leaves, **call.options)
    first = torch.autograd.grad(values, leaves, call.cotangent, retain_graph=True)
    second = torch.autograd.grad(values, leaves, call.cotangent)
    assert all(map(same_bits, first, second))


@every_operator
def test_overwritten_input_is_noticed_before_backward(backend):
    call = random_call(6, 4)
    leaf = call.x.clone().requires_grad_()
    activations = leaf * 1
    values = on_backend(backend)(activations, call.y, call.z, **call.options)
    activations.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        values.sum().backward()


@pytest.mark.parametrize("change, message", [
    ({"x": torch.zeros(4)}, r"x must have shape \(N, D\) with N, D >= 1, got \[4\]"),
    ({"x": torch.zeros(0, 3)}, r"x must have shape \(N, D\)"),
    ({"x": torch.zeros(4, 0)}, r"x must have shape \(N, D\)"),
    ({"y": torch.zeros(5, 3)}, "y and z must have the shape, dtype and device of x"),
    ({"y": torch.zeros(4, 3, dtype=torch.float64)}, "y and z must have the shape, dtype"),
    ({"z": torch.zeros(4, 2)}, "y and z must have the shape"),
    ({"measure": "cosine"}, 'measure must be "product" or "distance", got "cosine"'),
    ({"grad_values": torch.zeros(3, dtype=torch.float64)}, "grad_values must be float64 of shape"),
    ({"grad_values": torch.zeros(4)}, "grad_values must be float64 of shape"),
    ({"saved": torch.zeros(4, 1, 4)}, "saved must be what the forward made"),
    ({"saved": torch.zeros(4, 2, 4, dtype=torch.float64)}, "saved must be what the forward made"),
])  # fmt: skip
def test_native_operator_refuses_what_it_would_read_out_of_bounds(change, message):
    named = {
        "grad_values": torch.zeros(4, dtype=torch.float64),
        **{name: torch.zeros(4, 3) for name in "xyz"},
        "saved": torch.zeros(4, 2, 4),
        "normalize": True,
        "measure": "distance",
    } | change
    with pytest.raises(RuntimeError, match=f"^row_pairs: {message}"):
        backward_operator("native")(*named.values(), True, True, True)
    if not {"grad_values", "saved"} & set(change):
        with pytest.raises(RuntimeError, match=f"^row_pairs: {message}"):
            forward_operator("native")(*(named[name] for name in ("x", "y", "z", "normalize", "measure")))
