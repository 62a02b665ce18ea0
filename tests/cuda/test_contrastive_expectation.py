"""The expectation of the columns that the CUDA kernels of `contrastive` keep, against float64."""

import itertools

import pytest
import torch

from tests.cuda.contrastive_calls import check_parity, contrastive_fwd, run
from tests.cuda.test_contrastive import SIZES, TEMPERATURES, WIDTHS, flavours
from tests.support.contrastive import random_call


@flavours
@pytest.mark.parametrize(
    "n, m, d, temperature, splits",
    [(65, 70, 40, 0.1, 0), (3, 300, 17, 0.005, 3), (130, 65, 128, 10.0, 2), (2, 1, 1, 0.1, 0)],
)
def test_expectation(library, gpu, n, m, d, temperature, splits, dtype, tf32):
    """Attention with V = K: the same results, and gradients without a second walk."""
    call = random_call(
        n, m, d, dtype, temperature=temperature, ids=m > 1, keep_diagonal=True, positives=2,
        device=gpu.device,
    )  # fmt: skip
    _, _, launches = check_parity(library, call, tf32=tf32, splits=splits, expectation=True)
    if gpu.emulated:
        assert not any("contrastive_bwd_kernel" in launch.kernel for launch in launches)


@pytest.mark.parametrize(
    "dtype, d",
    [
        (torch.bfloat16, 257),
        (torch.float16, 520),
        (torch.float16, 200),
        (torch.float32, 260),
        (torch.float64, 129),
    ],
    ids=str,
)
def test_expectation_of_wide_rows(library, gpu, dtype, d):
    """Beyond the accumulators it is the product of the coefficients and the columns."""
    call = random_call(40, 150, d, dtype, ids=True, keep_diagonal=True, device=gpu.device)
    _, _, launches = check_parity(library, call, expectation=True, splits=2, blocks=(0, 1))
    if gpu.emulated:
        by_product = d * dtype.itemsize > 1024
        assert sum("coefficients_kernel" in launch.kernel for launch in launches) == (2 if by_product else 0)


@pytest.mark.slow
@flavours
@pytest.mark.parametrize("d", WIDTHS)
def test_expectation_everywhere(library, gpu, d, dtype, tf32):
    for i, (n, temperature, ids) in enumerate(itertools.product(SIZES, TEMPERATURES, (False, True))):
        call = random_call(
            n, 131 - n, d, dtype, temperature=temperature, ids=ids, keep_diagonal=i % 2 > 0, positives=i % 3,
            normalize=i % 5 > 0 or temperature < 1, seed=i, device=gpu.device,
        )  # fmt: skip
        check_parity(library, call, tf32=tf32, splits=i % 4, expectation=True)


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("column_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "n, m, d, splits", [(65, 70, 40, 0), (3, 300, 17, 3), (130, 65, 128, 2), (2, 1, 1, 0), (40, 150, 260, 2)]
)
def test_wide_rows_against_narrow_columns(library, gpu, n, m, d, splits, column_dtype, tf32):
    """As exact as columns of float32 would be, with the expectation and without."""
    call = random_call(
        n, m, d, torch.float32, ids=m > 1, keep_diagonal=True, positives=2, column_dtype=column_dtype,
        normalize=d != 40, temperature=0.1 if d != 40 else 10.0, device=gpu.device,
    )  # fmt: skip
    fwd, _, _ = check_parity(library, call, tf32=tf32, splits=splits, expectation=True)
    alone, _ = contrastive_fwd(library, call, splits=splits, tf32=tf32)
    torch.testing.assert_close(alone.lse, fwd.lse, rtol=1e-6, atol=1e-6)
    as_they_are = call.replace(normalize_columns=False)  # norms of float32 are added up in another order
    narrow, wide = (
        contrastive_fwd(library, one, splits=splits, tf32=tf32, expectation=True)[0]
        for one in (as_they_are, as_they_are.replace(columns=call.columns.float()))
    )
    if d <= 256:  # beyond, wide columns take the product of stored coefficients
        assert torch.equal(narrow.lse, wide.lse) and torch.equal(narrow.expectation, wide.expectation)
    else:
        torch.testing.assert_close(
            narrow.expectation, wide.expectation, rtol=2e-3, atol=2e-3 if tf32 else 2e-5
        )


def test_narrow_columns_of_any_layout(library, gpu):
    """Transposed, at an odd offset, and rows that only 8-byte accesses can read."""
    call = random_call(
        20, 50, 24, torch.float32, column_dtype=torch.bfloat16, temperature=1.0, device=gpu.device
    )
    within = torch.zeros(50, 60, dtype=torch.bfloat16, device=gpu.device)
    for columns in (
        call.columns.T.contiguous().T,
        within[:, 3:27].copy_(call.columns),
        within[:, 28:52].copy_(call.columns),
    ):
        check_parity(library, call.replace(columns=columns), expectation=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_expectation_is_the_softmax_average_of_the_columns(library, gpu, dtype):
    call = random_call(5, 70, 24, dtype, ids=True, temperature=1.0, device=gpu.device)
    call.row_ids[3] = 7
    call.column_ids[:] = 7  # nothing is left for row 3
    fwd, _ = contrastive_fwd(library, call, expectation=True)
    rows, columns = (torch.nn.functional.normalize(x.double()) for x in (call.rows, call.columns))
    expected = (rows @ columns.T).softmax(1) @ columns
    expected[3] = 0
    assert torch.isneginf(fwd.lse[3])
    torch.testing.assert_close(fwd.expectation.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_expectation_of_columns_of_very_different_length(library, gpu, dtype):
    call = random_call(12, 20, 24, dtype, device=gpu.device)
    call.rows[:6] *= 1e-3
    call.columns[::3] *= 1e3
    call.columns[7] = 0
    check_parity(library, call, expectation=True)


@pytest.mark.parametrize("scale", [0.0, -3.0, 1e4])
def test_expectation_at_any_scale(library, gpu, scale):
    call = random_call(20, 90, 8, torch.float32, device=gpu.device)
    call.scale.fill_(scale)
    check_parity(library, call, expectation=True, splits=2)


def test_expectation_meets_nan(library, gpu):
    call = random_call(6, 7, 8, torch.bfloat16, device=gpu.device)
    call.rows[1, 2] = torch.nan
    fwd, bwd, _ = run(library, call, call.upstream(), expectation=True)
    assert fwd.lse.isnan().tolist() == [False, True, False, False, False, False]
    assert bwd.grad_rows[1].isnan().all() and bwd.grad_scale.isnan() and not bwd.grad_rows[0].isnan().any()
    call.columns[3, 0] = torch.inf
    fwd, bwd, _ = run(library, call, call.upstream(), expectation=True)
    assert fwd.lse.isnan().all() and bwd.grad_rows.isnan().all()
