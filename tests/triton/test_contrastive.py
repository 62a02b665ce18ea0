"""The Triton kernels of `contrastive`, as compiled code, against float64."""

import itertools
import subprocess
import sys

import pytest
import torch

from ssl_kernels.triton import contrastive as kernels
from tests.helpers import DTYPES
from tests.support.contrastive import random_call
from tests.triton.contrastive_calls import backward, case, check, forward, run

SAMPLE = [
    case(127, None, 64, torch.bfloat16),
    case(130, None, 17, torch.float16, temperature=0.005, ids=True),
    case(128, 63, 123, torch.bfloat16, both_directions=True, ids=True, keep_diagonal=True),
    case(3, 64, 257, torch.bfloat16, both_directions=True, temperature=10.0),
    case(65, 3, 128, torch.float16, positives=2, normalize=False, temperature=10.0),
    case(65, None, 257, torch.float16, positives=2),
    case(63, None, 3, torch.float32, temperature=0.005),
    case(64, 127, 64, torch.float32, both_directions=True, ids=True),
    case(2, None, 1, torch.float64, positives=0),
    case(65, 31, 17, torch.float64, both_directions=True, temperature=0.005, ids=True),
    case(65, 128, 128, torch.bfloat16, expectation=True, ids=True, keep_diagonal=True),
    case(127, 65, 17, torch.float16, expectation=True, positives=2, temperature=0.005),
    case(3, 63, 64, torch.bfloat16, expectation=True, normalize=False, temperature=10.0),
    case(64, 32, 64, torch.float32, expectation=True),
    case(31, 65, 130, torch.float32, expectation=True, ids=True, temperature=0.005),
    case(17, 31, 100, torch.float64, expectation=True, positives=2),
    case(63, 33, 200, torch.bfloat16, expectation=True, normalize=False, temperature=10.0),
    case(17, 33, 257, torch.float32, expectation=True),  # too wide to keep it
]


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_matches_float64(gpu, case):
    with gpu.triton():
        case.check(gpu.device)


ADDITIONS = [
    case(63, None, 64, torch.bfloat16, positives=2, additions="bias padding limit exempt"),
    case(33, None, 17, torch.float32, ids=True, additions="bias limit"),
    case(64, 127, 40, torch.bfloat16, both_directions=True, ids=True, keep_diagonal=True, additions="bias limit only"),
    case(65, 33, 257, torch.float16, both_directions=True, additions="bias padding limit exempt"),
    case(32, 63, 17, torch.float32, both_directions=True, positives=2, additions="bias limit exempt"),
    case(16, 31, 17, torch.float64, both_directions=True, positives=0, additions="bias padding limit"),
    case(3, 1100, 16, torch.bfloat16, both_directions=True, additions="bias"),
    case(65, 128, 64, torch.bfloat16, expectation=True, additions="bias padding limit exempt"),
    case(65, 130, 64, torch.bfloat16, expectation=True, ids=True, additions="only"),
]  # fmt: skip


@pytest.mark.parametrize("case", ADDITIONS, ids=str)
def test_additions_match_float64(gpu, case):
    with gpu.triton():
        case.check(gpu.device)


@pytest.mark.parametrize("d", [17, 257])
def test_gradients_of_biases_alone(gpu, d):
    """The same whether the vectors get theirs or not, and 0 where nothing of the sums they are in has one."""
    call = random_call(
        33, 65, d, torch.bfloat16, both_directions=True, additions="bias padding limit", device=gpu.device
    )
    with gpu.triton():
        results = forward(call)
        every = backward(call, results)
        for wanted in [(True, False), (False, True)]:
            *vectors, _, by_columns, by_rows = backward(
                call, results, rows=False, columns=False, biases=wanted
            )
            assert [x.shape for x in vectors] == [(0,), (0,)]
            for bias, needed, expected in zip((by_columns, by_rows), wanted, every[3:], strict=True):
                expected = expected if needed else expected[:0]
                torch.testing.assert_close(bias, expected, rtol=1e-4, atol=1e-6)
        *_, by_columns, by_rows = backward(call, results, call.upstream()._replace(lse=None))
    assert (by_columns == 0).all() and by_rows.abs().max() > 0


def test_rows_whose_columns_are_all_padding_or_above_the_limit(gpu):
    call = random_call(5, 6, 17, torch.bfloat16, positives=0, additions="bias limit", device=gpu.device)
    call.row_limit[:] = torch.inf
    call.row_limit[0] = -torch.inf
    for everything in (False, True):
        if everything:
            call.column_bias[:] = -torch.inf
        with gpu.triton():
            results = forward(call)
            grads = backward(call, results)
        empty = slice(None) if everything else slice(1)
        assert (results[0][empty] == -torch.inf).all()
        assert (grads[0][empty] == 0).all() and all(grad.isfinite().all() for grad in grads)
        assert everything or results[0][1:].isfinite().all()


def test_not_a_number_passes_every_limit(gpu):
    call = random_call(5, 6, 17, torch.bfloat16, positives=0, additions="limit", device=gpu.device)
    call.columns[2] = torch.nan
    call.row_limit[:] = -torch.inf
    with gpu.triton():
        lse = forward(call)[0]
    assert lse.isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("square", [True, False], ids=["square", "rectangular"])
@pytest.mark.parametrize("d", [1, 3, 17, 64, 123, 128, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64_everywhere(gpu, dtype, d, square):
    sizes = [2, 3, 65, 130]
    for n, temperature, ids in itertools.product(sizes, [0.005, 0.1, 10.0], [False, True]):
        m = None if square else sizes[sizes.index(n) - 1]
        options = {} if square else {"both_directions": n != 3, "keep_diagonal": ids and n != 65}
        with gpu.triton(seed=n):
            case(n, m, d, dtype, temperature=temperature, ids=ids, seed=n, **options).check(gpu.device)


@pytest.mark.parametrize("data", ["zero rows", "equal rows", "uneven norms"])
def test_unusual_rows(gpu, data):
    call = random_call(65, None, 17, torch.float16, data=data, device=gpu.device)
    with gpu.triton():
        check(call)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["zero rows", "equal rows", "uneven norms"])
@pytest.mark.parametrize("d", [17, 257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unusual_rows_in_every_dtype(gpu, dtype, d, data):
    for m in (None, 65):
        call = random_call(65, m, d, dtype, data=data, both_directions=m is not None, device=gpu.device)
        with gpu.triton():
            check(call)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_expectation_is_split_and_spares_the_second_walk(gpu, dtype):
    call = random_call(3, 1100, 40, dtype, device=gpu.device)
    with gpu.triton() as launches:
        found = run(call, expectation=True)
    check(call, True, found)
    if gpu.emulated:
        kernels_run = [launch.kernel for launch in launches]
        (forward,) = (launch for launch in launches if launch.kernel == "contrastive_fwd_kernel")
        assert forward.grid[1] > 1 and "expectation_merge_kernel" in kernels_run
        assert not {"contrastive_bwd_kernel", "contrastive_coefficient_kernel"} & set(kernels_run)


@pytest.mark.parametrize("columns", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [17, 256])
def test_narrow_columns_are_those_widened(gpu, columns, d):
    """A bfloat16 queue beside float32 queries, in the forward that keeps the expectation and without."""
    call = random_call(5, 70, d, torch.float32, positives=2, device=gpu.device)
    call.columns = call.columns.to(columns)
    results = []
    for _ in range(2):
        with gpu.triton():
            alone = kernels.contrastive_fwd(*call.operands, *call.flags, False, False)
            results.append([*run(call, expectation=True).values(), *alone[:3]])
        call.columns = call.columns.float()
    for narrow, wide in zip(*results, strict=True):
        torch.testing.assert_close(narrow, wide, rtol=1e-5, atol=1e-6)


def test_expectation_without_columns(gpu):
    """What autograd saves when no positives are asked for: the columns are not read again."""
    call = random_call(5, 70, 17, torch.bfloat16, positives=0, device=gpu.device)
    call.row_ids = torch.tensor([7, 1, 2, 3, 4], device=gpu.device)
    call.column_ids = torch.full((70,), 7, device=gpu.device)
    with gpu.triton():
        results = forward(call, expectation=True)
        expected = backward(call, results, columns=False)
        upstream = call.upstream()
        call.columns = call.row_ids = call.column_ids = None
        got = backward(call, results, upstream, columns=False)
    assert (results[5][0] == 0).all() and results[0][0] == -torch.inf
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("layout", ["transposed", "strided"])
def test_any_strides(gpu, layout):
    def lay(rows):
        if layout == "transposed":
            return rows.T.contiguous().T
        padded = torch.full(
            (2 * len(rows), rows.shape[1] + 3), torch.nan, dtype=rows.dtype, device=gpu.device
        )
        padded[::2, : rows.shape[1]] = rows
        return padded[::2, : rows.shape[1]]

    call = random_call(65, 33, 17, torch.bfloat16, both_directions=True, device=gpu.device)
    call = call.replace(rows=lay(call.rows), columns=lay(call.columns))
    with gpu.triton():
        check(call)


@pytest.mark.parametrize("d, m", [(17, None), (257, None), (40, 130)])
def test_every_schedule_gives_the_same_bits(gpu, d, m):
    call = random_call(65, m, d, torch.bfloat16, device=gpu.device)
    schedules = [{"seed": 0}, {"seed": 1}, {"seed": 2, "warp_races": True}]
    results = []
    for schedule in schedules:
        with gpu.triton(**schedule):
            results.append(run(call, expectation=m is not None))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_rows_with_nothing_allowed(gpu):
    call = random_call(5, 6, 17, torch.bfloat16, positives=0, device=gpu.device)
    call.row_ids = torch.tensor([7, 1, 2, 3, 4], device=gpu.device)
    call.column_ids = torch.full((6,), 7, device=gpu.device)
    with gpu.triton():
        results = forward(call)
        grad_rows, _, grad_scale, *_ = backward(call, results)
    assert results[0][0] == -torch.inf and results[0][1:].isfinite().all()
    assert (grad_rows[0] == 0).all() and grad_rows[1:].isfinite().all() and grad_scale.isfinite()


@pytest.mark.parametrize("d", [17, 257])
def test_only_what_is_needed_is_returned(gpu, d):
    call = random_call(65, 33, d, torch.bfloat16, device=gpu.device)
    with gpu.triton():
        results = forward(call)
        both = backward(call, results)
        for rows_need_grad, columns_need_grad in [(True, False), (False, True), (False, False)]:
            grad_rows, grad_columns, grad_scale, *_ = backward(
                call, results, rows=rows_need_grad, columns=columns_need_grad
            )
            assert torch.equal(grad_rows, both[0] if rows_need_grad else both[0].new_empty(0))
            if columns_need_grad:
                # The panels of a wide D are then cut along the columns: another order of sums.
                torch.testing.assert_close(grad_columns, both[1], rtol=0.02, atol=1e-3)
            else:
                assert grad_columns.shape == (0,)
            torch.testing.assert_close(grad_scale, both[2], rtol=2e-3, atol=1e-3)


def test_a_missing_gradient_counts_as_zero(gpu):
    call = random_call(65, None, 17, torch.float16, device=gpu.device)
    with gpu.triton():
        results = forward(call)
        upstream = call.upstream()
        zero = backward(call, results, upstream._replace(lse=torch.zeros_like(upstream.lse)))
        missing = backward(call, results, upstream._replace(lse=None))
    assert torch.equal(zero[0], missing[0]) and zero[0].abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_few_rows_split_the_walk_over_columns(gpu, dtype):
    call = random_call(3, 1100, 16, dtype, both_directions=True, device=gpu.device)
    with gpu.triton() as launches:
        check(call)
    if gpu.emulated:
        (forward,) = (launch for launch in launches if launch.kernel == "contrastive_fwd_kernel")
        assert forward.grid[1] > 1
        assert sum(launch.kernel == "merge_lse_kernel" for launch in launches) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_little_scratch_gives_the_same_result(gpu, dtype, monkeypatch):
    call = random_call(300, 70, 300, dtype, both_directions=True, device=gpu.device)
    monkeypatch.setattr(kernels.panels, "SCRATCH_BYTES", 600)
    with gpu.triton() as launches:
        check(call)
    if gpu.emulated:
        counts = [launch.kernel for launch in launches]
        assert counts.count("contrastive_fwd_kernel") == 3
        assert counts.count("contrastive_coefficient_kernel") == 3


def test_positives_may_be_flat_and_count_from_the_end(gpu):
    call = random_call(65, 33, 17, torch.bfloat16, device=gpu.device)
    with gpu.triton():
        flat = run(call)
        call.positives = call.positives[:, None] % 33
        expected = run(call)
    assert flat["positive_logits"].shape == (65,) and call.positives.min() >= 0
    expected["positive_logits"] = expected["positive_logits"][:, 0]
    assert all(torch.equal(flat[name], expected[name]) for name in expected)


def test_smallest_temperature(gpu):
    """A positive that is the row itself at T = 1e-4: the loss is 0, not the rounding of 1e4."""
    call = random_call(33, 33, 64, torch.float32, temperature=1e-4, device=gpu.device)
    call.columns = call.rows.clone()
    call.positives = torch.arange(33, device=gpu.device)
    with gpu.triton():
        lse, _, positive_logits, *_ = forward(call)
    assert torch.equal(lse, positive_logits)


def test_float16_keeps_small_gradients(gpu):
    """Softmax weights of a mean over many rows lie below float16's smallest number."""
    call = random_call(65, None, 64, torch.float16, device=gpu.device)
    call.rows = call.rows / 8
    with gpu.triton():
        results = forward(call)
        grad_scale = backward(call, results)[2]
        lse, _, positive_logits = call.upstream()
        small_grad_scale = backward(call, results, (lse * 2**-30, None, positive_logits * 2**-30))[2]
    assert small_grad_scale * 2**30 == grad_scale != 0


def test_nan_reaches_its_row(gpu):
    call = random_call(65, 33, 17, torch.float32, positives=0, device=gpu.device)
    call.rows[3, 2] = torch.nan
    with gpu.triton():
        lse = forward(call)[0]
    assert lse[3].isnan() and lse.isnan().sum() == 1


def test_unsupported_calls_say_why(gpu):
    with gpu.triton():
        rows = torch.ones(4, 8, device=gpu.device)
        assert kernels.unsupported(rows) is None
        assert kernels.unsupported(rows.bfloat16(), rows.bfloat16()) is None
        assert "torch.int64" in kernels.unsupported(rows.long())
        assert "empty" in kernels.unsupported(rows, rows[:0])
        assert kernels.unsupported(rows, rows.bfloat16()) is None
        wide = torch.ones(4, 257, device=gpu.device)
        assert "at most 256 wide, not 257" in kernels.unsupported(wide, wide.half())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="capture needs a card")
def test_capture_in_a_cuda_graph():
    call = random_call(65, 130, 64, torch.bfloat16, both_directions=True, device="cuda")
    expected = run(call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(call)
    graph.replay()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)


def test_tables_need_no_triton():
    blocked = "import sys; sys.modules['triton'] = None; import ssl_kernels.triton.tiles"
    subprocess.run([sys.executable, "-c", blocked], check=True)


def test_tuning_needs_a_card():
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    run = subprocess.run([sys.executable, "-m", "ssl_kernels.triton.tune"], capture_output=True, text=True)
    assert run.returncode != 0 and "needs a CUDA GPU" in run.stderr
