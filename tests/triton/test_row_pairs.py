"""The Triton kernels of `row_pairs`, as compiled code: parity with float64, traffic."""

import dataclasses
import itertools

import pytest
import torch

from ssl_kernels.ops.library import accumulation_dtype
from ssl_kernels.triton.row_pairs import row_pairs_bwd, row_pairs_fwd
from tests.helpers import DTYPES
from tests.support.row_pairs import Call, check_results, random_call

MEASURES = ("product", "distance")


def run(gpu, call, needs=(True, True, True), **options):
    """Values and gradients on the CPU, and the launches of both directions."""
    x, y, z = (None if rows is None else rows.to(gpu.device) for rows in (call.x, call.y, call.z))
    needs = (*needs[:2], needs[2] and z is not None)
    flags = (call.normalize, call.measure)
    with gpu.triton(**options) as launches:
        values, saved = row_pairs_fwd(x, y, z, *flags)
        grads = row_pairs_bwd(call.cotangent.to(gpu.device), x, y, z, saved, *flags, *needs)
    return [tensor.cpu() for tensor in (values, *grads[: len(call.operands)])], launches


def check(gpu, call):
    check_results(run(gpu, call)[0], call, "triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("measure, triplet", list(itertools.product(MEASURES, [False, True])))
def test_matches_float64(gpu, dtype, measure, triplet):
    for n, d in ((1, 1), (9, 33), (19, 128)):
        check(gpu, random_call(n, d, dtype, measure=measure, triplet=triplet))
    check(gpu, random_call(5, 20, dtype, measure=measure, triplet=triplet, normalize=False))


@pytest.mark.parametrize("d", [300, 1100, 4096, 4100])
def test_wide_rows(gpu, d):
    """Of 4 and 8 warps, and of more than one block."""
    check(gpu, random_call(3, d, torch.float32))
    check(gpu, random_call(2, d, torch.bfloat16, triplet=False, measure="product"))


def test_strides(gpu):
    call = random_call(10, 24)
    x = call.x.to(gpu.device)
    shifted = torch.zeros(10, 31, device=gpu.device)[:, 5:29].copy_(x)
    for view in (x.T.contiguous().T, shifted, x[:1].expand(10, 24)):
        found, _ = run(gpu, dataclasses.replace(call, x=view))
        check_results(found, dataclasses.replace(call, x=view.cpu()), "triton")


@pytest.mark.parametrize("measure", MEASURES)
def test_short_and_nan_rows(gpu, measure):
    call = random_call(6, 8, measure=measure)
    call.x[0] = 0
    call.y[1] = 0
    call.z[2] *= 3e-14
    check(gpu, call)
    call.y[4, 3] = torch.nan
    for result in run(gpu, call)[0]:
        bad = result.isnan() if result.dim() == 1 else result.isnan().any(1)
        assert not bad[:4].any() and not bad[5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [37, 128, 5000])
def test_equal_rows_have_distance_and_gradient_zero(gpu, dtype, d):
    x = random_call(9, d, dtype).x
    found, _ = run(gpu, Call(x, x.clone(), None, True, "distance"))
    assert not any(result.any() for result in found)


def test_only_wanted_gradients_are_written(gpu):
    call = random_call(5, 12)
    everything, _ = run(gpu, call)
    for needs in itertools.product([False, True], repeat=3):
        found, _ = run(gpu, call, needs)
        for need, grad, expected in zip(needs, found[1:], everything[1:], strict=True):
            if need:  # another kernel, whose multiply-adds may be fused otherwise
                torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-6)
            else:
                assert grad.numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("triplet", [False, True])
@pytest.mark.parametrize("d", [128, 512, 2048])
def test_kernels_move_what_their_comments_say(gpu, dtype, triplet, d):
    """Sectors of 32 bytes within 10 % of the least."""
    n, pairs = 16, 1 + triplet
    _, launches = run(gpu, random_call(n, d, dtype, triplet=triplet))
    if not gpu.emulated:
        pytest.skip("a card has no counters to give")
    forward, backward = (launch.counters for launch in launches)
    rows = n * d * dtype.itemsize // 32
    few = n * pairs * 4 * torch.finfo(accumulation_dtype(torch.empty(0, dtype=dtype))).bits / 256 + n / 4
    assert forward.global_load_sectors == (1 + pairs) * rows
    assert forward.global_load_sectors + forward.global_store_sectors <= 1.1 * ((1 + pairs) * rows + few)
    assert backward.global_store_sectors == (1 + pairs) * rows
    assert backward.global_load_sectors + backward.global_store_sectors <= 1.1 * (
        2 * (1 + pairs) * rows + few
    )
