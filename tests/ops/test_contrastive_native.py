"""What is particular to the C++ kernel of `contrastive` on the CPU: kept logits, instruction sets, threads, memory."""

import threading

import pytest
import torch

from ssl_kernels import _C
from ssl_kernels.ops.contrastive import contrastive
from tests.helpers import random_rows, run_python, same_bits, saved_bytes
from tests.ops.test_contrastive_operator import backward_arguments
from tests.support.contrastive import (
    check_against_float64,
    check_results,
    exact,
    on_backend,
    random_call,
    relative_errors,
    results_and_gradients,
    term_sums,
)

forward = torch.ops.ssl_kernels.contrastive_fwd.native
backward = torch.ops.ssl_kernels.contrastive_bwd.native

# Sizes of one tile, of many, and with ragged ends; the square case walks half of the tiles.
SHAPES = [(5, None), (64, None), (259, None), (1031, None), (67, 5), (300, 1027), (1027, 300)]


@pytest.mark.parametrize("n, m", [(5, None), (259, None), (67, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_that_are_not_copied_give_the_same_bits_and_stay_as_they_are(n, m, dtype):
    """Rows without a gap are read where they lie, others from a copy."""
    call = random_call(n, m, 40, dtype, temperature=0.5, normalize_rows=False, normalize_columns=False)
    rows, columns = call.operands[:2]
    inputs = [x for x in (rows, columns) if x is not None]
    before = [x.detach().clone() for x in inputs]
    apart = [None if x is None else torch.stack((x, x), 2).detach()[:, :, 0] for x in (rows, columns)]
    lying, copied = (
        forward(*pair, *call.operands[2:], *call.flags, True, True) for pair in ((rows, columns), apart)
    )
    assert all(map(same_bits, lying[:5], copied[:5]))
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("n, m", SHAPES)
@pytest.mark.parametrize("temperature", [0.02, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_kept_logits_change_no_result(n, m, temperature, dtype):
    """Not a bit: how much is kept depends on what else is alive in the process."""
    call = random_call(
        n, m, 32, dtype, temperature=temperature, ids=3, both_directions=m is not None, positives=2
    )
    kept, recomputed = (forward(*call.operands, *call.flags, keep, True) for keep in (True, False))
    assert room(kept) > 0
    assert recomputed[5].numel() == 0
    copied = [*kept[:5], kept[5].clone()]  # as a hook on saved tensors may: it has none of them
    assert room(copied) == 0
    for first, second in zip(kept[:5], recomputed[:5], strict=True):
        assert same_bits(first, second)
    expected = backward(*backward_arguments(call, kept))
    for results in (recomputed, copied):
        for first, second in zip(backward(*backward_arguments(call, results)), expected, strict=True):
            assert same_bits(first, second)


def room(results):
    """Bytes of logits that lie behind `kept`."""
    kept = results[5]
    return kept.untyped_storage().nbytes() - kept.nbytes


def test_narrow_rows_are_recomputed():
    call = random_call(66, None, 31)
    assert room(forward(*call.operands, *call.flags, True, True)) == 0


@pytest.mark.parametrize("n, m, d", [(4200, None, 1500), (2500, 2700, 32), (4000, 4100, 32)])
def test_only_some_tiles_fit_the_budget(n, m, d):
    """More logits than 24 MB, or than half a matrix: some tiles are kept and the others recomputed."""
    call = random_call(n, m, d, both_directions=m is not None)
    kept = room(forward(*call.operands, *call.flags, True, True))
    everything = n * (n + 1) // 2 if m is None else n * m
    assert 0 < kept <= max(24 << 20, 2 * n * (m or 0))
    assert kept < 4 * everything
    expected = results_and_gradients(on_backend("chunked"), call)
    found = results_and_gradients(on_backend("native"), call)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("temperature", [0.02, 0.5])
@pytest.mark.parametrize("n, m", [(643, None), (300, 517)])
def test_equal_bit_for_bit_when_repeated(n, m, temperature, dtype):
    call = random_call(n, m, 40, dtype, temperature=temperature, both_directions=m is not None, ids=50)
    first = results_and_gradients(on_backend("native"), call)
    for _ in range(3):
        again = results_and_gradients(on_backend("native"), call)
        assert all(same_bits(again[name], first[name]) for name in first)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("temperature", [0.02, 0.5])
def test_any_number_of_threads(set_threads, threads, temperature):
    """The number of threads decides the size of the tiles, and so only the rounding of the sums."""
    set_threads(threads)
    few = ((1, None), (130, None), (389, None), (517, None), (259, 131), (70, 517))
    for n, m, d in (*((n, m, 33) for n, m in few), (150, 140, 260)):
        check_against_float64(
            "native", random_call(n, m, d, temperature=temperature, both_directions=m is not None)
        )


@pytest.mark.parametrize("n, m, d", [(517, None, 40), (150, 140, 260)])
def test_forward_and_backward_may_differ_in_threads(set_threads, n, m, d):
    call = random_call(n, m, d)
    for before, after in ((1, 3), (3, 1)):
        set_threads(before)
        z = call.rows.clone().requires_grad_()
        lse = contrastive(z, call.columns, call.scale, backend="native").lse
        (expected,) = torch.autograd.grad(lse.sum(), z, retain_graph=True)
        set_threads(after)
        (found,) = torch.autograd.grad(lse.sum(), z)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_two_threads_at_once():
    calls = [random_call(n, None, 40, temperature=0.1, seed=n) for n in (259, 300)]
    expected = [results_and_gradients(on_backend("native"), call) for call in calls]
    wrong = []

    def work(call, truth):
        for _ in range(10):
            found = results_and_gradients(on_backend("native"), call)
            wrong.extend(
                name for name in truth if not torch.allclose(found[name], truth[name], rtol=1e-5, atol=1e-6)
            )

    workers = [threading.Thread(target=work, args=pair) for pair in zip(calls, expected, strict=True)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


SAVE_RESULTS = """
import sys, torch
from ssl_kernels import _C
from tests.support.contrastive import on_backend, results_and_gradients
from tests.ops.test_contrastive_native import instruction_set_calls
assert _C.build_info()["cpu_instruction_set"] == sys.argv[1]
saved = []
for call in instruction_set_calls():
    saved.append(results_and_gradients(on_backend("native"), call))
torch.save(saved, sys.argv[2])
"""


def instruction_set_calls():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for temperature in (0.02, 0.5):
            for n, m in ((270, None), (70, 83)):
                options = {"temperature": temperature, "both_directions": m is not None, "ids": 9}
                yield random_call(n, m, 37, dtype, **options)
    for n, m in (
        (70, 83),
        (147, 133),
        (530, None),
    ):  # deeper, and wider, than a product's panels, with ragged edges
        for dtype in (torch.float32, torch.bfloat16):
            yield random_call(n, m, 523, dtype, both_directions=m is not None)


def test_instruction_sets_agree(tmp_path):
    """Each, in a process of its own, passes as the one that is chosen here does."""
    results = {}
    for name in _C.build_info()["cpu_instruction_sets"]:
        run_python(SAVE_RESULTS, name, str(tmp_path / name), SSL_KERNELS_CPU=name)
        results[name] = torch.load(tmp_path / name)
    assert "portable" in results
    for index, call in enumerate(instruction_set_calls()):
        for found in results.values():
            check_results(found[index], call)


def test_features_of_any_size():
    """Feature k is large in rows and small in columns or the other way round: every product counts the same."""
    n, m, d = 300, 290, 128
    generator = torch.Generator().manual_seed(0)
    size = 10 ** torch.empty(d).uniform_(-30, 30, generator=generator)
    rows = torch.randn(n, d, generator=generator) * size
    columns = torch.randn(m, d, generator=generator) / size
    scale, positives = torch.tensor(0.1), torch.randint(m, (n, 1), generator=generator)
    lse, _, logits = on_backend("native")(
        rows, columns, scale, positives=positives, normalize_rows=False, normalize_columns=False
    )
    similarities = 0.1 * rows.double() @ columns.double().T
    torch.testing.assert_close(lse, similarities.logsumexp(1), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits, similarities.gather(1, positives), rtol=0, atol=1e-5)


def test_unknown_instruction_set_is_named():
    code = """
import torch, ssl_kernels
try:
    ssl_kernels.nt_xent_loss(torch.randn(4, 8), torch.randn(4, 8), backend="native")
except (RuntimeError, ValueError) as error:
    print(error)
"""
    output = run_python(code, SSL_KERNELS_CPU="neon")
    assert "SSL_KERNELS_CPU must be amx, avx512_bf16, avx512, avx2 or portable" in output
    assert "neon" in output
    runnable = _C.build_info()["cpu_instruction_sets"]
    for name in {"amx", "avx512_bf16", "avx512", "avx2"} - set(runnable):
        output = run_python(code, SSL_KERNELS_CPU=name)
        assert f"this build have ({', '.join(runnable)}), got {name}" in output


def bfloat16_calls():
    """Gradients of every size: softmaxes near their targets and near uniform, each row with a gradient of its own."""
    for temperature in (0.005, 0.02, 0.1, 1.0):
        yield random_call(261, None, 96, torch.bfloat16, temperature=temperature)
        yield random_call(150, 190, 75, torch.bfloat16, temperature=temperature, both_directions=True, ids=40)
        call = random_call(130, None, 64, torch.bfloat16, temperature=temperature)
        views = call.rows[:65] + 0.1 * random_rows(65, 64, torch.bfloat16, seed=9)
        call.rows = torch.cat([call.rows[:65], views])
        call.positives = torch.arange(130).roll(65)
        yield call


def test_bfloat16_is_as_accurate_as_plain_bfloat16():
    """Not only as its tolerance: every result and gradient is nearer to float64 than plain PyTorch's in bfloat16."""
    for call in bfloat16_calls():
        truth, sums = exact(call), term_sums(call)
        found = relative_errors(results_and_gradients(on_backend("native"), call), truth, sums)
        plain = relative_errors(results_and_gradients(plain_bfloat16, call), truth, sums)
        for name in truth:
            assert found[name] <= plain[name], (name, call.scale, found[name], plain[name])


def plain_bfloat16(rows, columns, scale, *, positives, row_ids, column_ids, both_directions, **options):
    """As one writes it: each step in the dtype that torch gives it."""
    x = torch.nn.functional.normalize(rows)
    y = x if columns is None else torch.nn.functional.normalize(columns)
    logits = x @ y.T * scale.to(x.dtype)
    allowed = ~torch.eye(len(x), dtype=torch.bool) if columns is None else row_ids[:, None] != column_ids
    masked = logits.masked_fill(~allowed, -torch.inf)
    column_lse = masked.logsumexp(0) if both_directions else rows.new_empty(0)
    return masked.logsumexp(1), column_lse, logits.gather(1, positives[:, None] % len(y))[:, 0]


@pytest.mark.parametrize("length", [1e-30, 1e-9, 1e-5, 1e5, 1e9, 1e30])
@pytest.mark.parametrize("m", [None, 70])
def test_bfloat16_rows_of_any_length(length, m):
    """Normalised ones: their squares and the factors of their norms leave float32's range."""
    call = random_call(67, m, 40, torch.bfloat16)
    call.rows = call.rows * length
    call.rows[3] = 0
    check_against_float64("native", call)


@pytest.mark.parametrize("normalize_rows, normalize_columns", [(True, False), (False, True), (False, False)])
def test_bfloat16_rows_of_one_side_as_they_are(normalize_rows, normalize_columns):
    for d in (1, 33, 300):
        options = {
            "normalize_rows": normalize_rows,
            "normalize_columns": normalize_columns,
            "both_directions": True,
        }
        check_against_float64("native", random_call(67, 139, d, torch.bfloat16, temperature=4.0, **options))


def test_saved_tensors_are_bounded():
    """From forward to backward: the input, a few numbers per row, and logits within a budget for everything."""
    for n, d in ((512, 16), (512, 64), (5000, 64), (5000, 1200)):
        z, positives = random_rows(n, d).requires_grad_(), torch.arange(n)
        before = _C.held_bytes()["kept"]
        loss = []
        saved = saved_bytes(
            lambda z=z, positives=positives, loss=loss: loss.append(
                on_backend("native")(z, None, torch.tensor(2.0), positives=positives)
            )
        )
        saved += _C.held_bytes()["kept"] - before
        budget = max(24 << 20, (116 << 20) - 4 * z.nbytes)
        kept = 0 if d < 32 else min(budget, n * (n + 256) // 2 * 4)
        assert z.nbytes <= saved <= z.nbytes + kept + 40 * n + 256
        loss.clear()
        assert _C.held_bytes()["kept"] == before


def test_kept_memory_is_reused_and_never_shared(monkeypatch):
    """Two steps whose backwards come after both forwards have kept logits of their own; later steps take them over."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # see pool.h
    calls = [random_call(700, None, 32, seed=seed) for seed in range(2)]
    alone = []
    for call in calls:
        results = forward(*call.operands, *call.flags, True, False)
        alone.append(backward(*backward_arguments(call, results)))
    interleaved = [forward(*call.operands, *call.flags, True, False) for call in calls]
    kept = [results[5].data_ptr() for results in interleaved]
    assert room(interleaved[0]) > 1 << 19 and len(set(kept)) == 2
    for call, results, expected in zip(calls, interleaved, alone, strict=True):
        for found, right in zip(backward(*backward_arguments(call, results)), expected, strict=True):
            assert same_bits(found, right)
    del results
    interleaved.clear()
    step = [forward(*calls[0].operands, *calls[0].flags, True, False)[5].data_ptr() for _ in range(2)]
    assert step[0] == step[1]
