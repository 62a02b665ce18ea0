"""CUDA kernels of `sigmoid_pairs`, as nvcc compiled them, against float64."""

import itertools
from math import ceil

import pytest
import torch

from tests.cuda.sigmoid_pairs_calls import (
    check_parity,
    losses,
    total_with_gradients,
    weighted_gradients,
)
from tests.cuda.test_contrastive import DTYPES, WIDTHS, flavours
from tests.support.sigmoid_pairs import random_call

SOURCE = "sigmoid_pairs.cu"
STEP_BYTES, SECTOR = 128, 32


@flavours
@pytest.mark.parametrize(
    "n, m, d, scale, bias, diagonal, splits",
    [
        (1, 1, 1, 10.0, -10.0, 0, 0),
        (65, 65, 17, 10.0, -10.0, 0, 2),
        (130, 65, 40, 1.0, 0.0, -65, 0),
        (3, 200, 128, 100.0, -5.0, 97, 3),
    ],
)
def test_matches_float64(library, gpu, n, m, d, scale, bias, diagonal, splits, dtype, tf32):
    call = random_call(n, m, d, dtype, scale=scale, bias=bias, diagonal=diagonal, device=gpu.device)
    check_parity(library, call, tf32=tf32, splits=splits)


@flavours
@pytest.mark.parametrize("ids", ["left out", "positive"])
def test_ids_match_float64(library, gpu, ids, dtype, tf32):
    call = random_call(70, 65, 17, dtype, bias=-3.0, diagonal=-3, ids=ids, device=gpu.device)
    check_parity(library, call, tf32=tf32, splits=2)


def test_the_diagonal_counts_although_its_ids_are_equal(library, gpu):
    call = random_call(20, 24, 8, torch.float32, device=gpu.device)
    plain = losses(library, call)[0]
    own = torch.arange(24, device=gpu.device)
    for sense in (False, True):
        marks = {"row_ids": own[:20], "column_ids": own, "equal_ids_are_positive": sense}
        assert torch.equal(losses(library, call.replace(**marks))[0], plain)


@pytest.mark.slow
@flavours
@pytest.mark.parametrize("d", WIDTHS)
def test_matches_float64_everywhere(library, gpu, d, dtype, tf32):
    for i, (n, (scale, bias)) in enumerate(
        itertools.product((2, 3, 65, 130), ((10.0, -10.0), (1.0, 2.0), (100.0, -30.0)))
    ):
        call = random_call(
            n, 131 - n, d, dtype, scale=scale, bias=bias, diagonal=(0, 40, -3)[i % 3], seed=i,
            normalize_columns=i % 4 > 0 or scale > 1, device=gpu.device,
        )  # fmt: skip
        check_parity(library, call, tf32=tf32, splits=i % 4)


@pytest.mark.parametrize(
    "dtype, d",
    [(torch.bfloat16, 257), (torch.float16, 520), (torch.float16, 200), (torch.float32, 260)],
    ids=str,
)
def test_wide_rows(library, gpu, dtype, d):
    check_parity(library, random_call(40, 70, d, dtype, device=gpu.device))


@pytest.mark.parametrize(
    "dtype, tf32, d, ids",
    [
        (torch.float64, False, 64, None),
        (torch.float32, True, 130, "left out"),
        (torch.float16, False, 260, "positive"),
        (torch.bfloat16, False, 256, None),
    ],
)
def test_both_gradients_of_wide_rows_from_one_set_of_coefficients(library, gpu, dtype, tf32, d, ids):
    call = random_call(131, 135, d, dtype, bias=-3.0, diagonal=-2, ids=ids, device=gpu.device)
    call.rows[:6] *= 1e-3
    call.rows[7] = 0
    call.columns[::3] *= 1e3
    launches = check_parity(library, call, tf32=tf32, splits=2, blocks=(1, 0))
    if gpu.emulated:
        assert not any("pairs_bwd_kernel" in launch.kernel for launch in launches)
        assert sum("coefficients_kernel" in launch.kernel for launch in launches) == 2 * 2


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_gradients_of_wide_rows_that_are_not_needed(library, gpu, needed):
    call = random_call(20, 33, 256, torch.float16, device=gpu.device)
    total, everything, _ = total_with_gradients(library, call)
    some_total, some, launches = total_with_gradients(library, call, needed=needed)
    for ours, full in zip(some[:2], everything[:2], strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, full, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(some_total, total)
    torch.testing.assert_close(some.scale, everything.scale, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(some.bias, everything.bias, rtol=1e-5, atol=1e-6)
    if gpu.emulated:
        assert sum("coefficients_kernel" in launch.kernel for launch in launches) == 1


def test_no_positive_pair_in_sight(library, gpu):
    """A diagonal beyond the columns, as an other rank's block has it."""
    call = random_call(20, 24, 8, torch.float32, diagonal=1000, device=gpu.device)
    check_parity(library, call)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zero_and_very_different_rows(library, gpu, dtype):
    call = random_call(12, 20, 24, dtype, device=gpu.device)
    call.rows[:6] *= 1e-3
    call.rows[7] = 0
    call.columns[::3] *= 1e3
    call.columns[4] = 0
    check_parity(library, call)


def test_strides(library, gpu):
    call = random_call(30, 33, 24, torch.float16, device=gpu.device)
    columns = torch.zeros(33, 31, dtype=torch.float16, device=gpu.device)[:, 5:29].copy_(call.columns)
    check_parity(library, call.replace(rows=call.rows.T.contiguous().T, columns=columns))


@pytest.mark.parametrize("scale, bias", [(0.0, -1.0), (-3.0, 5.0), (1000.0, -100.0)])
def test_any_scale(library, gpu, scale, bias):
    check_parity(library, random_call(20, 21, 8, torch.float32, scale=scale, bias=bias, device=gpu.device))


def test_losses_keep_their_digits_where_all_are_small(library, gpu):
    """At bias -20 a pair's loss is 2e-9, and log(1 + 2e-9) in float32 would be 0."""
    call = random_call(8, 300, 16, torch.float32, scale=0.1, bias=-20.0, diagonal=5000, device=gpu.device)
    got, _ = losses(library, call)
    z = (
        0.1
        * torch.nn.functional.normalize(call.rows.double())
        @ torch.nn.functional.normalize(call.columns.double()).T
        - 20
    )
    torch.testing.assert_close(got, torch.log1p(z.exp()).sum(1), rtol=5e-6, atol=0)


def test_nan_reaches_what_it_meets(library, gpu):
    call = random_call(6, 7, 8, torch.float32, device=gpu.device)
    call.rows[1, 2] = torch.nan
    by_row, _ = losses(library, call)
    assert by_row.isnan().tolist() == [False, True, False, False, False, False]
    total, grads, _ = total_with_gradients(library, call)
    assert total.isnan() and grads.bias.isnan() and grads.scale.isnan() and grads.columns.isnan().all()
    assert grads.rows[1].isnan().all() and not grads.rows[0].isnan().any()


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
def test_gradients_that_are_not_needed(library, gpu, needed):
    call = random_call(20, 33, 24, torch.float32, device=gpu.device)
    total, everything, _ = total_with_gradients(library, call)
    some_total, some, launches = total_with_gradients(library, call, needed=needed)
    for ours, full, need in zip(some[:2], everything[:2], needed, strict=True):
        assert torch.equal(ours, full) if need else ours is None
    torch.testing.assert_close(some_total, total)
    torch.testing.assert_close(some.scale, everything.scale, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(some.bias, everything.bias, rtol=1e-5, atol=1e-6)
    if gpu.emulated:
        assert sum("bwd_kernel" in launch.kernel for launch in launches) == max(1, sum(needed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_schedule_gives_the_same_bits(library, gpu, dtype):
    call = random_call(130, 70, 72, dtype, device=gpu.device)
    weights = torch.rand(130, dtype=torch.float64, device=gpu.device)

    def run(**options):
        total, grads, _ = total_with_gradients(library, call, splits=2, **options)
        weighted, _ = weighted_gradients(library, call, weights, splits=2, **options)
        by_row, _ = losses(library, call, splits=2, **options)
        return (total, by_row, *grads, *weighted)

    first = run()
    for seed in (1, 2):
        for a, b in zip(first, run(seed=seed, warp_races=True), strict=True):
            assert torch.equal(a, b)


def test_calls_can_be_captured(library, gpu):
    if not gpu.emulated:
        pytest.skip("tests/ops captures the operator on a card")
    launches = check_parity(library, random_call(20, 300, 17, torch.float16), capturing=True, stream=7)
    assert {launch.stream for launch in launches} == {7}


@pytest.mark.parametrize(
    "n, m, d, dtype",
    [(128, 256, 128, torch.bfloat16), (256, 128, 192, torch.float16), (128, 64, 32, torch.float32)],
)
def test_kernels_do_what_their_headers_say(library, gpu, n, m, d, dtype):
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    call = random_call(n, m, d, dtype)
    half = dtype.itemsize == 2
    steps, streamed = ceil(d * dtype.itemsize / STEP_BYTES), ceil(d * dtype.itemsize / STEP_BYTES) > 3

    def of(launches, kernel, shared):
        found = [launch for launch in launches if kernel in launch.kernel]
        assert {launch.shared for launch in found} == {shared}
        return [launch.counters for launch in found]

    own_slots = min(steps, 3)
    shared = own_slots * 128 * STEP_BYTES + 3 * 64 * (STEP_BYTES + 4)
    (forward,) = of(losses(library, call, splits=1)[1], "fwd_kernel", shared)
    blocks, tiles = ceil(n / 128), ceil(m / 64)
    assert forward.mma == (256 * blocks * tiles * steps if half else 0)
    own = 4 * n * steps * (tiles if streamed else 1)
    paper = own + 4 * blocks * m * steps + blocks * tiles * 64 // 8 + 24 * blocks
    assert forward.global_load_sectors == pytest.approx(paper, rel=0.01)
    assert forward.shared_wavefronts == forward.shared_wavefronts_ideal

    block_n = 64 if half else 32
    shared = ((own_slots + 1) * 128 + 3 * block_n) * STEP_BYTES + 2 * (128 + 3 * block_n) * 4
    weights = torch.ones(n, dtype=torch.float64)
    for launches, terms in (
        (total_with_gradients(library, call, splits=1)[2], 1),
        (weighted_gradients(library, call, weights, splits=1)[1], 2),
    ):
        passes = of(launches, "bwd_kernel", shared)
        for counters, (rows, columns) in zip(passes, ((n, m), (m, n)), strict=True):
            blocks, tiles = ceil(rows / 128), ceil(columns / block_n)
            assert counters.mma == (2 * blocks * tiles * steps * 128 * block_n // 32 if half else 0)
            own = 4 * rows * steps * (tiles if streamed else 1)
            paper = own + 8 * blocks * columns * steps + terms * blocks * (128 + tiles * block_n) // 8
            assert counters.global_load_sectors == pytest.approx(paper, rel=0.02)
            assert counters.global_store_sectors == pytest.approx(rows * d * 4 // SECTOR, rel=0.04)
            assert not half or counters.shared_wavefronts == counters.shared_wavefronts_ideal


@pytest.mark.parametrize("d, dtype", [(256, torch.bfloat16), (128, torch.float32), (768, torch.bfloat16)])
def test_coefficients_do_what_their_header_says(library, gpu, d, dtype):
    """Own rows stay in shared memory where they fit beside the other side's: 7 steps on sm_80, 11 on sm_90."""
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    n, m = 128, 256
    call = random_call(n, m, d, dtype)
    half, steps, tiles = dtype.itemsize == 2, d * dtype.itemsize // STEP_BYTES, m // 128
    stays = steps <= {80: 7, 90: 11}[library.arch]
    _, _, launches = total_with_gradients(library, call, splits=1)
    (launch,) = [launch for launch in launches if "coefficients_kernel" in launch.kernel]
    assert launch.shared == ((steps if stays else 3) + 3) * 128 * STEP_BYTES + 2 * 2 * 128 * 4
    assert launch.counters.mma == (4 * tiles * steps * 128 if half else 0)
    paper = 4 * n * steps * (1 if stays else tiles) + 4 * m * steps + tiles * (128 // 8 + 32)
    assert launch.counters.global_load_sectors == pytest.approx(paper, rel=0.02)
    assert launch.counters.global_store_sectors == pytest.approx(
        128 * tiles * 128 * dtype.itemsize // SECTOR, rel=0.01
    )
    assert launch.counters.shared_wavefronts == launch.counters.shared_wavefronts_ideal


@pytest.mark.parametrize("kernel, d", [("fwd_kernel", 64), ("bwd_kernel", 64), ("coefficients_kernel", 256)])
def test_ids_are_read_as_the_headers_say(library, gpu, kernel, d):
    """Of the rows once a warp and tile; of the columns once a tile, but where they come into registers at once."""
    if not gpu.emulated:
        pytest.skip("a card has no such counters")
    n, m = 128, 256
    counters = []
    for ids in (None, "left out"):
        call = random_call(n, m, d, torch.bfloat16, bias=-3.0, ids=ids)
        launches = losses(library, call, splits=1)[1] + total_with_gradients(library, call, splits=1)[2]
        counters.append(next(launch.counters for launch in launches if kernel in launch.kernel))
    without, found = counters
    tiles, columns = (m // 128, 8 * 128) if kernel == "coefficients_kernel" else (m // 64, 64 // 4)
    of_rows = 32 if kernel == "fwd_kernel" else 64
    assert found.global_load_sectors - without.global_load_sectors == tiles * (of_rows + columns)
    assert found.async_copies - without.async_copies == (0 if columns > 16 else tiles * 2)
    assert found.shared_wavefronts == found.shared_wavefronts_ideal
