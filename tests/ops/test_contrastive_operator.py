"""`contrastive` as a PyTorch operator: opcheck, torch.compile, autocast, saved memory, and what it refuses."""

import itertools

import pytest
import torch

import ssl_kernels
from ssl_kernels import arguments
from ssl_kernels.ops.contrastive import contrastive
from tests.helpers import BACKENDS, DTYPES, OPERATORS, same_bits
from tests.support.contrastive import (
    on_backend,
    random_call,
    results_and_gradients,
)

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_operator = pytest.mark.parametrize("backend", OPERATORS)


def forward_operator(backend):
    return getattr(torch.ops.ssl_kernels.contrastive_fwd, backend)


def backward_operator(backend):
    return getattr(torch.ops.ssl_kernels.contrastive_bwd, backend)


def backward_arguments(call, results, rows_need_grad=True, columns_need_grad=True):
    lse, column_lse, _, row_rnorm, column_rnorm, kept = results
    saved = (lse, column_lse, row_rnorm, column_rnorm, kept)
    return (*call.upstream(), *call.operands, *saved, *call.flags, rows_need_grad, columns_need_grad)


@every_operator
@pytest.mark.parametrize("m, options", [
    (None, {}),
    (None, {"positives": 0, "ids": 2, "normalize_rows": False}),
    (9, {"both_directions": True, "positives": 2}),
    (9, {"ids": 3, "keep_diagonal": True, "normalize_columns": False}),
])  # fmt: skip
def test_opcheck(backend, m, options):
    call = random_call(7, m, 40, torch.bfloat16, **options)
    torch.library.opcheck(forward_operator(backend), (*call.operands, *call.flags, False, True))
    keeping = (*call.operands, *call.flags, True, True)
    torch.library.opcheck(forward_operator(backend), keeping)
    results = forward_operator(backend)(*keeping)
    for wanted in ((True, True), (False, False)):
        torch.library.opcheck(backward_operator(backend), backward_arguments(call, results, *wanted))


@every_operator
@pytest.mark.parametrize(
    "n, m, d", [(5, None, 8), (70, None, 40), (300, None, 64), (70, 9, 33), (2600, 2600, 32)]
)
def test_fake_tensors_have_the_shapes_of_the_real_ones(backend, n, m, d):
    call = random_call(n, m, d, both_directions=m is not None)
    arguments = (*call.operands, *call.flags, True, True)
    real = forward_operator(backend)(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        on_fake = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        fake = forward_operator(backend)(*on_fake)
    assert [(f.shape, f.dtype, f.stride()) for f in fake] == [(r.shape, r.dtype, r.stride()) for r in real]


@pytest.mark.filterwarnings("ignore")
@every_operator
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("m", [None, 9])
def test_compiles_without_a_graph_break(backend, dynamic, m):
    torch._dynamo.reset()
    compiled = torch.compile(on_backend(backend), fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (6, 11) if dynamic else (6,):
        call = random_call(n, m, 40, both_directions=m is not None, ids=3)
        eager = results_and_gradients(on_backend(backend), call)
        found = results_and_gradients(compiled, call)
        assert found.keys() == eager.keys()
        for name in eager:
            torch.testing.assert_close(found[name], eager[name], rtol=1e-6, atol=1e-6)


def unusual_call(kind, n, m, d, **options):
    call = random_call(n, m, d, **options)
    if kind == "infinite":
        call.rows[1, 0] = torch.inf
        if m is not None:
            call.columns[2, 1] = -torch.inf
    elif kind == "overflowing":
        call.scale.fill_(3e38)
    elif kind == "masked":
        call.row_ids = torch.zeros(n, dtype=torch.int64)
        call.column_ids = None if m is None else torch.zeros(m, dtype=torch.int64)
    return call


def unused_outputs(call):
    """Gradients of the outputs with some of them None, and the same with zeros."""
    present = [k for k, grad in enumerate(backward_arguments(call, [None] * 6)[:3]) if grad is not None]
    for unused in itertools.product((False, True), repeat=len(present)):
        if any(unused):
            yield [k for k, none in zip(present, unused, strict=True) if none]


@every_operator
@pytest.mark.parametrize("kind", ["infinite", "overflowing", "masked"])
@pytest.mark.parametrize("normalize", [True, False], ids=["unit", "raw"])
@pytest.mark.parametrize("m", [None, 7])
def test_zeros_are_no_gradient(backend, kind, normalize, m):
    """torch.compile passes zeros for outputs that nothing uses: 0 · inf of them must not reach the gradients."""
    for positives, both, columns_need_grad, keep, d in itertools.product(
        (0, 2), (False, True), (False, True), (False, True), (8, 40)
    ):
        if m is None and (both or columns_need_grad):
            continue
        options = {"normalize_rows": normalize, "normalize_columns": normalize, "both_directions": both}
        call = unusual_call(kind, 9, m, d, positives=positives, **options)
        results = forward_operator(backend)(*call.operands, *call.flags, keep, columns_need_grad)
        arguments = backward_arguments(call, results, True, columns_need_grad)
        for unused in unused_outputs(call):
            none, zeros = list(arguments), list(arguments)
            for k in unused:
                none[k], zeros[k] = None, torch.zeros_like(arguments[k])
            pairs = zip(backward_operator(backend)(*none), backward_operator(backend)(*zeros), strict=True)
            for expected, found in pairs:
                torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.filterwarnings("ignore")
@every_operator
def test_an_output_that_is_unused_gives_no_gradient_when_compiled(backend):
    call = random_call(6, None, 8, normalize_rows=False, temperature=1e-30)
    call.rows *= 1e5  # logits leave float32, and lse is infinite
    torch._dynamo.reset()
    run = on_backend(backend)
    grads = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        rows = call.rows.clone().requires_grad_()
        function(rows, None, call.scale, **call.options).positive_logits.sum().backward()
        grads.append(rows.grad)
    torch.testing.assert_close(*grads, equal_nan=True)
    assert grads[0].isfinite().all()


@every_backend
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_changes_nothing(backend, dtype, autocast):
    """The operation accumulates in float32 as it is; autocast would take digits from the logits."""
    call = random_call(70, 66, 40, dtype, both_directions=True)
    expected = results_and_gradients(on_backend(backend), call)

    def under_autocast(*operands, **options):
        with torch.autocast("cpu", autocast):
            return contrastive(*operands, backend=backend, **options)

    found = results_and_gradients(under_autocast, call)
    assert all(same_bits(found[name], expected[name]) for name in expected)


@every_operator
def test_backward_under_autocast_changes_nothing(backend):
    call = random_call(70, 66, 40, both_directions=True)
    expected = results_and_gradients(on_backend(backend), call)
    with torch.autocast("cpu", torch.bfloat16):
        found = results_and_gradients(on_backend(backend), call)
    assert all(same_bits(found[name], expected[name]) for name in expected)


@every_operator
@pytest.mark.parametrize("m", [None, 5])
@pytest.mark.parametrize("twice", ["rows", "columns", "scale", "cotangent"])
def test_second_derivative_is_an_error(backend, m, twice):
    """By whatever the gradient depends on, even where that is all that takes a gradient."""
    call = random_call(6, m, 4)
    seed = torch.ones(6, dtype=torch.float64)
    leaves = {"rows": call.rows, "columns": call.columns, "scale": call.scale, "cotangent": seed}
    leaf = leaves[twice] if leaves[twice] is not None else leaves["rows"]
    leaf.requires_grad_()
    first = leaf if twice != "cotangent" else leaves["rows"].requires_grad_()
    lse = contrastive(leaves["rows"], leaves["columns"], leaves["scale"], backend=backend).lse
    (grad,) = torch.autograd.grad(lse, first, seed, create_graph=True)
    with pytest.raises(
        RuntimeError, match=f'"{backend}" has no second derivative; backend="reference" has one'
    ):
        torch.autograd.grad(grad.sum(), leaf)


@every_operator
def test_functions_of_the_gradient_need_no_second_derivative(backend):
    """create_graph alone changes no number: a gradient penalty that is only read works."""
    call = random_call(66, None, 8)
    z = call.rows.clone().requires_grad_()
    lse = contrastive(z, None, call.scale, backend=backend).lse
    (with_graph,) = torch.autograd.grad(lse.sum(), z, create_graph=True)
    (without,) = torch.autograd.grad(lse.sum(), z)
    assert same_bits(with_graph.detach(), without)


@every_operator
def test_overwritten_input_is_noticed_before_backward(backend):
    z = random_call(66, None, 8).rows.requires_grad_()
    activations = z * 1
    lse = contrastive(activations, None, torch.tensor(2.0), backend=backend).lse
    activations.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lse.sum().backward()


@every_operator
@pytest.mark.parametrize("m", [None, 50])
def test_nothing_is_kept_without_a_gradient(backend, m):
    call = random_call(70, m, 64)
    with torch.no_grad():
        leaf = call.rows.clone().requires_grad_()
        result = contrastive(leaf, call.columns, call.scale, backend=backend)
    assert not result.lse.requires_grad
    assert forward_operator(backend)(*call.operands, *call.flags, False, True)[5].numel() == 0


@every_backend
@pytest.mark.parametrize("m", [None, 66])
@pytest.mark.parametrize("index", [66, -67, 10**12])
def test_positives_out_of_range_are_refused(backend, m, index):
    call = random_call(66, m, 8, positives=2)
    call.positives[64, 1] = index
    with pytest.raises((IndexError, RuntimeError), match=r"positives must be in|out of (bounds|range)"):
        contrastive(call.rows, call.columns, call.scale, positives=call.positives, backend=backend)


@pytest.mark.parametrize("change, message", [
    ({"rows": torch.zeros(4)}, "rows must be 2-d"),
    ({"rows": torch.zeros(0, 3)}, "must not be empty|int64 of shape"),
    ({"columns": torch.zeros(5, 2)}, "columns must have the width"),
    ({"columns": torch.zeros(5, 3, dtype=torch.float64)}, "float64 goes with float64 alone"),
    ({"columns": torch.zeros(0, 3)}, "must not be empty"),
    ({"scale": torch.zeros(2)}, "scale must be one number"),
    ({"scale": torch.zeros((), dtype=torch.float64)}, "scale must be one number of dtype Float"),
    ({"positives": torch.zeros(3, dtype=torch.int64)}, "positives must be int64 of shape"),
    ({"positives": torch.zeros(4, dtype=torch.int32)}, "positives must be int64 of shape"),
    ({"positives": torch.zeros(4, 1, 1, dtype=torch.int64)}, "positives must be int64 of shape"),
    ({"row_ids": torch.zeros(3, dtype=torch.int64)}, "row_ids must be int64 of shape"),
    ({"row_ids": torch.zeros(4)}, "row_ids must be int64 of shape"),
    ({"column_ids": torch.zeros(4, dtype=torch.int64)}, "column_ids must be int64 of shape|go together"),
    ({"row_ids": torch.zeros(4, dtype=torch.int64)}, "go together"),
])  # fmt: skip
def test_native_operator_refuses_what_it_would_read_out_of_bounds(change, message):
    operands = {
        "rows": torch.zeros(4, 3),
        "columns": torch.zeros(5, 3),
        "scale": torch.tensor(1.0),
        "positives": torch.zeros(4, dtype=torch.int64),
        "row_ids": None,
        "column_ids": None,
    } | change
    with pytest.raises(RuntimeError, match=message):
        forward_operator("native")(*operands.values(), True, True, False, False, False, False)


def test_native_backward_refuses_a_foreign_lse():
    call = random_call(4, None, 3)
    results = list(forward_operator("native")(*call.operands, *call.flags, False, True))
    for lse in (results[0][:3], results[0].float()):
        with pytest.raises(RuntimeError, match="lse must be what contrastive_fwd returned"):
            backward_operator("native")(*backward_arguments(call, [lse, *results[1:]]))


def test_a_backend_that_cannot_run_is_named_with_the_reason():
    call = random_call(4, None, 3)
    message = r'^contrastive: backend "triton" cannot run this call: it runs on cuda, not on cpu$'
    with pytest.raises(ValueError, match=message):
        contrastive(call.rows, None, call.scale, backend="triton")
    with pytest.raises(ValueError, match=r"^contrastive: backend must be .* or None, got 'cuda'$"):
        contrastive(call.rows, None, call.scale, backend="cuda")
    assert ssl_kernels.backends_for("contrastive", call.rows)["triton"] == "it runs on cuda, not on cpu"


@pytest.mark.parametrize(
    "operator, named",
    [
        ("contrastive_fwd", arguments.ContrastiveForward),
        ("contrastive_bwd", arguments.ContrastiveBackward),
        ("sigmoid_pairs_fwd", arguments.SigmoidPairsForward),
        ("sigmoid_pairs_bwd", arguments.SigmoidPairsBackward),
    ],
)
def test_named_arguments_are_those_of_the_schema(operator, named):
    """Backends in Python name by place what the dispatcher hands them."""
    overloads = getattr(torch.ops.ssl_kernels, operator)
    for overload in overloads.overloads():
        schema = getattr(overloads, overload)._schema.arguments
        assert [argument.name for argument in schema] == list(named._fields)
        defaults = {each.name: each.default_value for each in schema if each.has_default_value()}
        assert defaults == named._field_defaults
