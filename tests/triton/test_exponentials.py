"""One exponential per entry where logits are bounded, in the Triton kernels of `contrastive`: as accurate as two, and
copies of the kernels, broken at one place, that must be noticed."""

import importlib

import pytest
import torch
from triton.compiler.errors import CompilationError

from tests.gpu_emulation import PtxError, emulated_triton
from tests.support.contrastive import random_call
from tests.triton.contrastive_calls import backward, check, forward
from tests.triton.mutation import load

# On both sides of 1 / temperature · log2(e) = 32, up to where one exponential does for both sums.
BELOW, ABOVE = 0.0448, 0.0454


def near_the_bound(temperature, m, d, dtype=torch.float32, n=35, **options):
    """A call with equal rows among others, so that some logits are as large as they can be."""
    call = random_call(
        n, m, d, dtype, temperature=temperature, ids=True, both_directions=m is not None,
        keep_diagonal=m is not None, **options,
    )  # fmt: skip
    call.rows[1:5] = call.rows[0]
    if m is not None:
        call.columns[3:6] = call.rows[0]
    return call


def check_small_gradients(kernels, m, d, device="cpu"):
    """Where every logit is as large as can be, the power of a row's lse is small, and yet its gradient is not lost."""
    call = random_call(33, m, d, temperature=ABOVE, both_directions=m is not None, device=device)
    for rows in (call.rows, call.columns):
        if rows is not None:
            rows[:] = 1 + rows / 100
    results = forward(call, kernels=kernels)
    large, small = (
        backward(
            call,
            results,
            [None if grad is None else grad * size for grad in call.upstream()],
            kernels=kernels,
        )
        for size in (2.0**40, 2.0**-100)
    )
    assert large[0].isfinite().all() and large[0].abs().max() > 0
    for ours, expected in zip(small, large, strict=True):
        room = 1e-5 * expected.abs().max().item() if expected.numel() else 0
        torch.testing.assert_close(ours.double() * 2.0**140, expected.double(), rtol=0, atol=room)


def check_nothing_allowed(kernels, m, d, device="cpu"):
    """Of a row, and in both directions of a column: neither has a gradient, and the others have theirs."""
    call = random_call(
        6, m, d, positives=0, ids=2, both_directions=m is not None, additions="only", device=device
    )
    call.row_ids[1] = 7
    if m is not None:
        call.column_ids[2] = 8
    results = forward(call, kernels=kernels)
    rows, columns, scale, *_ = backward(call, results, kernels=kernels)
    assert results[0][1] == -torch.inf and (rows[1] == 0).all() and rows.isfinite().all()
    assert rows.abs().amax(1).gt(0).sum() >= 4 and scale.isfinite()
    if m is not None:
        assert results[1][2] == -torch.inf and (columns[2] == 0).all() and columns.isfinite().all()
        assert columns.abs().amax(1).gt(0).sum() >= m - 2


def exponentials_hold(kernels):
    """In the fused backward (half precision, narrow), in the panels (float32) and in both directions."""
    half = torch.bfloat16
    for temperature in (BELOW, ABOVE, 0.005, -0.005):
        for m, d, dtype in (
            (None, 24, half),
            (33, 24, half),
            (None, 40, torch.float32),
            (33, 40, torch.float32),
        ):
            check(near_the_bound(temperature, m, d, dtype), kernels=kernels)
    check(near_the_bound(0.1, 33, 24, torch.float16, positives=2), kernels=kernels)
    check(near_the_bound(0.1, None, 136, torch.float16, positives=2), kernels=kernels)
    for which in ("rows", "columns"):
        call = near_the_bound(1.0, 33, 24)
        setattr(call, f"normalize_{which}", False)
        getattr(call, which).mul_(30)
        check(call, kernels=kernels)
    for additions, missing in (("limit", ()), ("bias", ("row_bias",)), ("bias", ("column_bias",))):
        check(
            near_the_bound(0.1, 33, 24, additions=additions).replace(**dict.fromkeys(missing)),
            kernels=kernels,
        )
    for m, d in ((None, 40), (33, 40)):
        check_small_gradients(kernels, m, d)
        check_nothing_allowed(kernels, m, d)
    one_sum = random_call(20, 33, 24, both_directions=True)
    results = forward(one_sum, kernels=kernels)
    upstream = one_sum.upstream()
    for missing in ("lse", "column_lse"):
        zero = upstream._replace(**{missing: torch.zeros_like(getattr(upstream, missing))})
        ours = backward(one_sum, results, upstream._replace(**{missing: None}), kernels=kernels)
        for got, expected in zip(ours, backward(one_sum, results, zero, kernels=kernels), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


COEFFICIENTS = "_coefficient_kernel(\n"
MUTATIONS = [
    ("common", "<= MOST_BOUNDED_LOGIT", "<= 1e9"),
    ("common", "tl.abs(scale * LOG2E)", "scale * LOG2E"),
    ("contrastive_fwd", "x_rnorm_ptr is not None and", ""),
    ("contrastive_fwd", "x_rnorm_ptr is not None and y_rnorm_ptr is not None", "x_rnorm_ptr is not None"),
    ("contrastive_fwd", "x_bias_ptr is not None or y_bias_ptr is not None", "y_bias_ptr is not None"),
    ("contrastive_fwd", "x_bias_ptr is not None or y_bias_ptr is not None", "x_bias_ptr is not None"),
    ("contrastive_fwd", "tl.where(rows < N, exp2(shift), 0.0)", "exp2(shift)"),
    ("contrastive_fwd", "exp2(shift), 0.0)", "1.0, 0.0)"),
    ("contrastive_fwd", "tl.zeros_like(column_total)", "tl.zeros_like(column_total) + 1.0"),
    ("contrastive_bwd", "exp2(-exact)", "exp2(exact)"),
    ("contrastive_bwd", "tl.where(empty, 0.0, SHARED_FACTOR * exp2(-exact))", "SHARED_FACTOR * exp2(-exact)"),
    ("contrastive_bwd", "SHARED_FACTOR * exp2", "exp2"),
    ("contrastive_bwd", "(x_weight[:, None] + y_weight[None, :])", "x_weight[:, None]", "of_sums = exp2"),
    ("contrastive_bwd", "(x_weight[:, None] + y_weight[None, :])", "y_weight[None, :]", "of_sums = exp2"),
    ("contrastive_bwd", "(x_weight[:, None] + y_weight[None, :])", "x_weight[:, None]", COEFFICIENTS),
    ("contrastive_bwd", "(x_weight[:, None] + y_weight[None, :])", "y_weight[None, :]", COEFFICIENTS),
    ("contrastive_bwd", "gradient *= tl.where(shares_exponential, 1.0 / SHARED_FACTOR, 1.0)", "gradient *= 1.0"),
    ("contrastive_bwd", "x_rnorm *= tl.where(shares_exponential, 1.0 / SHARED_FACTOR, 1.0)", "x_rnorm *= 1.0"),
    ("contrastive_bwd", "factor * tl.load(grad_ptr + offsets, mask=rows", "tl.load(grad_ptr + offsets, mask=rows"),
    ("contrastive_bwd", "factor * tl.load(grad_ptr + offsets, mask=columns",
     "tl.load(grad_ptr + offsets, mask=columns"),
    ("contrastive", "has_both_sums and has_norms", "has_norms"),
    ("contrastive", "and (square or grad_column_lse is not None)", ""),
    ("contrastive", "has_both_sums and has_norms", "has_both_sums"),
    ("contrastive", "call.normalize_rows and (square or call.normalize_columns)", "call.normalize_rows"),
    ("contrastive", "has_norms and not has_additions", "has_norms"),
    ("contrastive", "return 1.0 if dtype == torch.float16 else 2.0**40", "return 2.0**40"),
    ("contrastive", "return 1.0 if dtype == torch.float16 else 2.0**40", "return 1.0"),
]  # fmt: skip


@pytest.mark.parametrize("temperature", [BELOW, ABOVE])
@pytest.mark.parametrize("m", [None, 33], ids=["square", "both directions"])
@pytest.mark.parametrize("d", [24, 136], ids=["narrow", "wide"])
def test_one_and_two_exponentials_are_as_accurate(gpu, temperature, m, d):
    with gpu.triton():
        check(near_the_bound(temperature, m, d, torch.bfloat16, device=gpu.device))


@pytest.mark.parametrize("m", [None, 33], ids=["square", "both directions"])
def test_a_large_negative_scale_takes_two_exponentials(gpu, m):
    with gpu.triton():
        check(near_the_bound(-0.001, m, 24, torch.bfloat16, device=gpu.device))


@pytest.mark.parametrize("m", [None, 33], ids=["square", "both directions"])
def test_small_gradients_keep_their_digits(gpu, m):
    kernels = importlib.import_module("ssl_kernels.triton.contrastive")
    with gpu.triton():
        check_small_gradients(kernels, m, 40, gpu.device)
        check_nothing_allowed(kernels, m, 40, gpu.device)


@pytest.mark.slow
def test_exponentials_hold():
    with emulated_triton(80):
        exponentials_hold(importlib.import_module("ssl_kernels.triton.contrastive"))


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: f"{mutation[1]} -> {mutation[2]}")
def test_mutation_is_noticed(tmp_path, monkeypatch, mutation):
    monkeypatch.syspath_prepend(tmp_path)
    broken = load(tmp_path, "contrastive", *mutation)
    with emulated_triton(80), pytest.raises((AssertionError, PtxError, CompilationError)):
        exponentials_hold(broken)
