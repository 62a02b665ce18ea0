"""CUDA kernels of `contrastive`, as nvcc compiled them, against float64."""

import itertools

import numpy as np
import pytest
import torch

from tests.cuda.conftest import SOURCES
from tests.cuda.contrastive_calls import check_parity, contrastive_bwd, contrastive_fwd, run
from tests.gpu_emulation import CudaError
from tests.support.contrastive import random_call

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
FLAVOURS = [*[(dtype, False) for dtype in DTYPES], (torch.float32, True)]
WIDTHS = [1, 3, 17, 64, 123, 128, 257]
SIZES = [2, 3, 65, 130]
TEMPERATURES = [0.005, 0.1, 10.0]


def flavour_name(flavour):
    return "tf32" if flavour[1] else str(flavour[0]).removeprefix("torch.")


flavours = pytest.mark.parametrize("dtype, tf32", FLAVOURS, ids=map(flavour_name, FLAVOURS))


@flavours
@pytest.mark.parametrize(
    "n, d, temperature, ids",
    [
        (2, 1, 0.1, False),
        (3, 3, 10.0, True),
        (65, 17, 0.005, True),
        (65, 128, 0.1, False),
        (130, 64, 0.1, True),
    ],
)
def test_square_matches_float64(library, gpu, n, d, temperature, ids, dtype, tf32):
    call = random_call(n, None, d, dtype, temperature=temperature, ids=ids, device=gpu.device)
    check_parity(library, call, tf32=tf32)


@pytest.mark.slow
@flavours
@pytest.mark.parametrize("d", WIDTHS)
def test_square_matches_float64_everywhere(library, gpu, d, dtype, tf32):
    for i, (n, temperature, ids) in enumerate(itertools.product(SIZES, TEMPERATURES, (False, True))):
        call = random_call(n, None, d, dtype, temperature=temperature, ids=ids, seed=i, device=gpu.device)
        check_parity(library, call, tf32=tf32)


@pytest.mark.slow
@flavours
@pytest.mark.parametrize("d", WIDTHS)
def test_rectangle_matches_float64_everywhere(library, gpu, d, dtype, tf32):
    for i, (n, temperature, ids) in enumerate(itertools.product(SIZES, TEMPERATURES, (False, True))):
        call = random_call(
            n, 131 - n, d, dtype, temperature=temperature, ids=ids, both_directions=i % 3 > 0,
            keep_diagonal=i % 2 > 0, positives=i % 3, seed=i, device=gpu.device,
        )  # fmt: skip
        check_parity(library, call, tf32=tf32, splits=i % 4)


@flavours
def test_rectangle_in_both_directions_with_ids(library, gpu, dtype, tf32):
    call = random_call(
        65, 70, 40, dtype, ids=True, both_directions=True, keep_diagonal=True, positives=2,
        device=gpu.device,
    )  # fmt: skip
    check_parity(library, call, tf32=tf32)


@pytest.fixture
def small_card(gpu, nvcc):
    """The launchers for a card of one multiprocessor, where a block has several blocks of rows to walk."""
    return gpu.cuda_library([SOURCES / "contrastive.cu"], multiprocessors=1)


@flavours
@pytest.mark.parametrize("n, m, d, splits", [(300, 130, 24, 0), (515, 65, 200, 2)])
def test_both_directions_by_groups_of_row_blocks(small_card, gpu, n, m, d, splits, dtype, tf32):
    call = random_call(
        n, m, d, dtype, ids=True, both_directions=True, keep_diagonal=True, positives=2, device=gpu.device
    )
    _, _, launches = check_parity(small_card, call, tf32=tf32, splits=splits)
    if gpu.emulated:
        assert [launch.grid for launch in launches if "fwd_kernel" in launch.kernel] == [(2, splits or 1, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [1e4, 1e-3, 0.0, -30.0])
def test_both_directions_at_any_scale(small_card, gpu, scale, dtype):
    """With the largest logits of a column in its first, second or last block of rows."""
    call = random_call(300, 21, 8, dtype, both_directions=True, device=gpu.device)
    call.rows[[0, 150, 299]] = call.columns[[1, 2, 3]]
    call.scale.fill_(scale)
    check_parity(small_card, call)


def test_columns_without_any_row(small_card, gpu):
    """Left out by all rows, or by all but those of the last block."""
    call = random_call(300, 70, 8, torch.float32, ids=True, both_directions=True, device=gpu.device)
    call.row_ids[:] = 1
    call.row_ids[256:] = 2
    call.column_ids[:] = 3
    call.column_ids[[4, 69]] = 1
    fwd, _, _ = check_parity(small_card, call)
    assert fwd.column_lse.isfinite().all()
    call.row_ids[:] = 1
    fwd, _, _ = check_parity(small_card, call)
    assert torch.isneginf(fwd.column_lse).nonzero()[:, 0].tolist() == [4, 69]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_that_just_fit(library, gpu, dtype):
    """Streamed owner tiles."""
    call = random_call(40, None, 255, dtype, device=gpu.device)
    _, _, launches = check_parity(library, call)
    if gpu.emulated:
        assert sum("contrastive_bwd_kernel" in launch.kernel for launch in launches) == 1


wide = pytest.mark.parametrize(
    "dtype, tf32, d",
    [
        (torch.float64, False, 64),
        (torch.float32, False, 130),
        (torch.float32, True, 128),
        (torch.float16, False, 260),
        (torch.bfloat16, False, 256),
    ],
    ids=["float64", "float32", "tf32", "float16", "bfloat16"],
)


def blocks(launches):
    assert not any("contrastive_bwd_kernel" in launch.kernel for launch in launches)
    return sum("coefficients_kernel" in launch.kernel for launch in launches)


@pytest.mark.parametrize("dtype, tf32, d", [(torch.float32, True, 130), (torch.float16, False, 256)], ids=str)
def test_blocks_of_wide_rows(library, gpu, dtype, tf32, d):
    """Coefficients in memory, a block of rows and columns at a time."""
    call = random_call(130, None, d, dtype, ids=True, positives=2, device=gpu.device)
    _, _, launches = check_parity(library, call, tf32=tf32, blocks=(1, 1))
    if gpu.emulated:
        assert blocks(launches) == 2 * 2


@wide
def test_both_gradients_of_a_wide_rectangle_from_one_set_of_coefficients(library, gpu, dtype, tf32, d):
    call = random_call(
        131,
        135,
        d,
        dtype,
        ids=True,
        both_directions=True,
        keep_diagonal=True,
        positives=2,
        device=gpu.device,
    )
    _, _, launches = check_parity(library, call, tf32=tf32, splits=2, blocks=(100, 200))
    if gpu.emulated:
        assert blocks(launches) == 2


@pytest.mark.slow
@wide
def test_wide_rows_everywhere(library, gpu, dtype, tf32, d):
    for i, (n, temperature, ids) in enumerate(itertools.product(SIZES, TEMPERATURES, (False, True))):
        for m in (None, 195 - n):
            call = random_call(
                n, m, d + i % 2 * 43, dtype, temperature=temperature, ids=ids, both_directions=bool(m) and i % 3 > 0,
                keep_diagonal=bool(m) and i % 2 > 0, positives=i % 3, seed=i, device=gpu.device,
            )  # fmt: skip
            check_parity(library, call, tf32=tf32, splits=i % 4, blocks=(i % 5 // 2, i % 3 // 2))


@pytest.mark.parametrize("scale", [0.0, -3.0, 1e4])
def test_wide_rows_at_any_scale(library, gpu, scale):
    call = random_call(5, 7, 130, torch.float32, both_directions=True, ids=True, device=gpu.device)
    call.scale.fill_(scale)
    check_parity(library, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_wide_rows_of_any_layout_and_length(library, gpu, dtype):
    """In a block of several, on either side of a product, with gradients of both sides and of one."""
    for m in (4, None):
        call = random_call(130, m, 260, dtype, device=gpu.device)
        call.rows[:6] *= 1e-3
        call.rows[7] = 0
        rows = torch.zeros(130, 268, dtype=dtype, device=gpu.device)[:, 8:].copy_(call.rows)
        call = call.replace(rows=rows)
        if m is not None:
            call.columns[::3] *= 1e3
            columns = call.columns.T.contiguous().T
            call = call.replace(columns=columns, normalize_columns=dtype == torch.float16)
        check_parity(library, call, blocks=(1, 0))


@pytest.mark.parametrize("splits", [2, 3, 100])
def test_split_walk_over_columns(library, gpu, splits):
    call = random_call(20, 300, 64, torch.bfloat16, both_directions=True, ids=True, device=gpu.device)
    check_parity(library, call, splits=splits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strides(library, gpu, dtype):
    """Transposed rows, columns out of a wider matrix at an odd offset, overlapping rows."""
    call = random_call(30, 33, 24, dtype, device=gpu.device)
    rows = call.rows.T.contiguous().T
    columns = torch.zeros(33, 31, dtype=dtype, device=gpu.device)[:, 5:29].copy_(call.columns)
    check_parity(library, call.replace(rows=rows, columns=columns))
    repeated = call.rows[:1].expand(30, 24)
    third = call.replace(rows=repeated, columns=call.columns[::3], positives=call.positives % 11)
    check_parity(library, third)


def test_row_offsets_over_32_bits(library, gpu):
    d, stride = 64, 2**31 + 64
    if gpu.emulated:  # numpy leaves the pages untouched, so they take no memory
        memory = torch.from_numpy(np.empty(stride + d, np.int16)).view(torch.bfloat16)
    else:
        memory = torch.zeros(stride + d, dtype=torch.bfloat16, device=gpu.device)
    call = random_call(2, None, d, torch.bfloat16, device=gpu.device)
    rows = memory.as_strided((2, d), (stride, 1)).copy_(call.rows)
    check_parity(library, call.replace(rows=rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_and_equal_rows(library, gpu, dtype):
    call = random_call(12, None, 24, dtype, device=gpu.device)
    call.rows[3] = 0
    call.rows[5:9] = call.rows[4]
    check_parity(library, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_of_very_different_length(library, gpu, dtype):
    call = random_call(12, 20, 24, dtype, device=gpu.device)
    call.rows[:6] *= 1e-3
    call.columns[::3] *= 1e3
    check_parity(library, call)


def test_row_shorter_than_the_smallest_norm(library, gpu):
    """1 / max(|x|, 1e-12) is constant there, so its gradient has no projection."""
    call = random_call(5, None, 8, torch.float32, device=gpu.device)
    call.rows[2] = 3e-13
    check_parity(library, call)


def test_rows_as_they_are(library, gpu):
    square = random_call(20, None, 40, torch.float16, normalize=False, temperature=2.0, device=gpu.device)
    check_parity(library, square)
    mixed = random_call(20, 9, 40, torch.float32, temperature=2.0, device=gpu.device)
    check_parity(library, mixed.replace(normalize_columns=False))


@pytest.mark.parametrize("scale", [0.0, -3.0, 1e4])
def test_any_scale(library, gpu, scale):
    call = random_call(20, 21, 8, torch.float32, both_directions=True, ids=True, device=gpu.device)
    call.scale.fill_(scale)
    check_parity(library, call)


def test_rows_without_any_column(library, gpu):
    call = random_call(9, None, 8, torch.float32, ids=True, device=gpu.device)
    call.row_ids.zero_()
    fwd, _, _ = check_parity(library, call)
    assert torch.isneginf(fwd.lse).all()


def test_nan_and_infinity_reach_the_results(library, gpu):
    call = random_call(6, 7, 8, torch.float32, device=gpu.device)
    call.rows[1, 2] = torch.nan
    fwd, bwd, _ = run(library, call, call.upstream())
    assert fwd.lse.isnan().tolist() == [False, True, False, False, False, False]
    both, _ = contrastive_fwd(library, call.replace(both_directions=True))
    assert both.lse.isnan().tolist() == fwd.lse.isnan().tolist() and both.column_lse.isnan().all()
    assert bwd.grad_rows[1].isnan().all() and bwd.grad_scale.isnan() and not bwd.grad_rows[0].isnan().any()
    call.columns[3, 0] = torch.inf
    fwd, _ = contrastive_fwd(library, call)
    assert fwd.lse.isnan().all()
    call.rows[1, 2] = 1
    both, _ = contrastive_fwd(library, call.replace(both_directions=True))
    assert both.lse.isnan().all() and both.column_lse.isnan().tolist() == [j == 3 for j in range(7)]


@pytest.mark.parametrize(
    "needed, d, kernel",
    [
        ((True, False), 24, "bwd_kernel"),
        ((False, True), 24, "bwd_kernel"),
        ((False, False), 24, "bwd_kernel"),
        ((False, False), 257, "coefficients_kernel"),
    ],
)
def test_gradients_that_are_not_needed(library, gpu, needed, d, kernel):
    """They are not computed, and grad_scale is right without them."""
    call = random_call(20, 33, d, torch.float32, both_directions=True, device=gpu.device)
    upstream = call.upstream()
    fwd, everything, _ = run(library, call, upstream)
    some, launches = contrastive_bwd(
        library, call, fwd, *upstream, rows_need_grad=needed[0], columns_need_grad=needed[1]
    )
    for ours, full, need in zip(some[:2], everything[:2], needed, strict=True):
        assert torch.equal(ours, full) if need else ours is None
    torch.testing.assert_close(some.grad_scale, everything.grad_scale, rtol=1e-5, atol=1e-6)
    if gpu.emulated:
        assert sum(kernel in launch.kernel for launch in launches) == max(1, sum(needed))


@pytest.mark.parametrize("absent", ["lse", "positive_logits"])
def test_absent_gradients_count_as_zero(library, gpu, absent):
    call = random_call(20, None, 24, torch.float16, device=gpu.device)
    upstream = call.upstream()
    zero = upstream._replace(**{absent: torch.zeros_like(getattr(upstream, absent))})
    fwd, expected, _ = run(library, call, zero)
    got, _ = contrastive_bwd(library, call, fwd, *upstream._replace(**{absent: None}))
    torch.testing.assert_close(got.grad_rows, expected.grad_rows, rtol=2e-3, atol=1e-6)


def test_every_schedule_gives_the_same_column_sums(small_card, gpu):
    """Where a block adds to its column sums block after block of rows."""
    call = random_call(300, 70, 40, torch.float16, both_directions=True, ids=True, device=gpu.device)
    first, _ = contrastive_fwd(small_card, call, splits=2)
    for seed in (1, 2):
        again, _ = contrastive_fwd(small_card, call, splits=2, seed=seed, warp_races=True)
        assert torch.equal(again.lse, first.lse) and torch.equal(again.column_lse, first.column_lse)


@pytest.mark.parametrize("expectation", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_schedule_gives_the_same_bits(library, gpu, dtype, expectation):
    """Random orders of blocks, warps and lanes, with races between lanes of a warp looked for as well."""
    call = random_call(130, 70, 72, dtype, both_directions=not expectation, ids=True, device=gpu.device)
    check_every_schedule(library, call, splits=2, expectation=expectation)


@pytest.mark.parametrize(
    "dtype, d", [(torch.bfloat16, 320), pytest.param(torch.float32, 130, marks=pytest.mark.slow)], ids=str
)
def test_every_schedule_of_blocks_gives_the_same_bits(library, gpu, dtype, d):
    call = random_call(130, 200, d, dtype, both_directions=True, device=gpu.device)
    check_every_schedule(library, call, splits=2, blocks=(1, 1))


def test_a_product_that_fails_is_an_error(library, gpu):
    if not gpu.emulated:
        pytest.skip("its product fails on any device")
    call = random_call(4, None, 256, torch.float16)
    fwd, _ = contrastive_fwd(library, call)
    with pytest.raises(CudaError, match="returned 1"):
        contrastive_bwd(library, call, fwd, *call.upstream(), multiply=None)


def check_every_schedule(library, call, **options):
    upstream = call.upstream()
    first = run(library, call, upstream, **options)[:2]
    for seed in (1, 2):
        again = run(library, call, upstream, **options, seed=seed, warp_races=True)[:2]
        for a, b in zip(itertools.chain(*first), itertools.chain(*again), strict=True):
            assert a is b is None or torch.equal(a, b)


def test_calls_can_be_captured(library, gpu):
    """No synchronisation and no allocation between the launches, all on the stream given."""
    if not gpu.emulated:
        pytest.skip("tests/test_card.py captures the operators on a card")
    call = random_call(20, 300, 17, torch.float16, both_directions=True)
    for expectation in (False, True):
        call = call.replace(both_directions=not expectation)
        _, _, launches = run(
            library, call, call.upstream(), expectation=expectation, capturing=True, stream=7
        )
        assert {launch.stream for launch in launches} == {7}
    call = random_call(130, None, 520, torch.float16)
    _, _, launches = run(library, call, call.upstream(), blocks=(1, 1), capturing=True, stream=7)
    assert {launch.stream for launch in launches} == {7}


@pytest.mark.parametrize("temperature", [0.044, 0.046])
@pytest.mark.parametrize("d", [40, 136], ids=["narrow", "wide"])
def test_one_and_two_exponentials_are_as_accurate(library, gpu, d, temperature):
    """On both sides of the temperature where one does for both sides' sums, with equal rows among others."""
    for m in (None, 70):
        call = random_call(
            65, m, d, torch.float32, temperature=temperature, ids=True, both_directions=m is not None,
            keep_diagonal=m is not None, device=gpu.device,
        )  # fmt: skip
        call.rows[1:9] = call.rows[0]
        if m is not None:
            call.columns[3:6] = call.rows[0]
        check_parity(library, call)


@pytest.mark.parametrize("both_directions", [False, True], ids=["square", "both directions"])
def test_small_gradients_keep_their_digits_with_one_exponential(library, gpu, both_directions):
    """Where every logit is as large as it can be, a column's weight and its power of two would vanish together."""
    n = 33
    call = random_call(
        n, n if both_directions else None, 8, torch.float32, temperature=0.0465, positives=0,
        both_directions=both_directions, device=gpu.device,
    )  # fmt: skip
    for rows in filter(lambda rows: rows is not None, (call.rows, call.columns)):
        rows[:] = 1 + rows / 100
    fwd, _ = contrastive_fwd(library, call)
    upstream = [None if grad is None else grad * 2.0**40 for grad in call.upstream()]
    large, _ = contrastive_bwd(library, call, fwd, *upstream)
    small, _ = contrastive_bwd(
        library, call, fwd, *[None if grad is None else grad * 2.0**-140 for grad in upstream]
    )
    for ours, expected in zip(small, large, strict=True):
        if ours is not None:
            size = expected.abs().max().item()
            torch.testing.assert_close(ours.double() * 2.0**140, expected.double(), rtol=0, atol=1e-5 * size)
