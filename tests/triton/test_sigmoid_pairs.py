"""The Triton kernel of `sigmoid_pairs`, as compiled code, against float64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_kernels.triton import panels
from ssl_kernels.triton import sigmoid_pairs as kernels
from ssl_kernels.triton.panels import wide_product
from ssl_kernels.triton.sigmoid_pairs import sigmoid_pairs_fwd, unsupported
from tests.support.sigmoid_pairs import NAMES, check_results, random_call


def check(call, kernels=kernels):
    """Losses and weighted gradients, and the sum of the losses with the gradients that are kept beside it."""
    losses, *nothing = kernels.sigmoid_pairs_fwd(*call.operands, False, True, True, True, *call.marks)
    assert all(tensor.shape == (0,) for tensor in nothing)
    grads = kernels.sigmoid_pairs_bwd(call.cotangent, *call.operands, True, True, *call.marks)
    check_results(dict(zip(NAMES, (losses, *grads), strict=True)), call, "triton", rounds_coefficients=True)
    whole = call.replace(total=True)
    total, *grads = kernels.sigmoid_pairs_fwd(*call.operands, True, True, True, True, *call.marks)
    grads = [(grad * whole.cotangent).to(grad.dtype) for grad in grads]  # kept in the accumulation dtype
    found = (total, *(grad.to(call.rows.dtype) for grad in grads[:2]), *grads[2:])
    check_results(dict(zip(NAMES, found, strict=True)), whole, "triton", rounds_coefficients=True)


@pytest.mark.parametrize(
    "n, m, d, dtype, scale, bias, diagonal, normalize",
    [
        (127, 64, 40, torch.bfloat16, 10.0, -5.0, 3, True),
        (130, 65, 17, torch.float16, 2.0, 1.0, -65, True),
        (64, 31, 33, torch.float32, 10.0, -10.0, 0, True),
        (17, 33, 20, torch.float64, 0.5, 0.0, 2, True),  # logits about 0: the whole series of log1p
        (33, 63, 144, torch.float16, 10.0, -5.0, -3, True),  # wide rows: coefficients through memory
        (129, 33, 320, torch.bfloat16, 10.0, -5.0, 2, True),
        pytest.param(33, 65, 600, torch.bfloat16, 2.0, -5.0, 40, False, marks=pytest.mark.slow),
        pytest.param(33, 65, 129, torch.float32, 10.0, -5.0, 0, True, marks=pytest.mark.slow),
        pytest.param(33, 65, 256, torch.bfloat16, 10.0, -5.0, -3, True, marks=pytest.mark.slow),
        pytest.param(33, 20, 128, torch.float64, 2.0, 1.0, 0, False, marks=pytest.mark.slow),
        pytest.param(65, 65, 128, torch.float16, 1.0, -10.0, 0, False, marks=pytest.mark.slow),
        pytest.param(3, 1100, 64, torch.bfloat16, 10.0, -10.0, 0, True, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_matches_float64(gpu, n, m, d, dtype, scale, bias, diagonal, normalize):
    call = random_call(
        n, m, d, dtype, scale=scale, bias=bias, diagonal=diagonal, normalize_rows=normalize,
        normalize_columns=normalize, device=gpu.device,
    )  # fmt: skip
    with gpu.triton():
        check(call)


@pytest.mark.parametrize("ids", ["left out", "positive"])
@pytest.mark.parametrize(
    "n, m, d, dtype, diagonal",
    [
        (65, 130, 40, torch.bfloat16, 3),
        (33, 65, 144, torch.float16, -3),  # wide rows: coefficients through memory
        pytest.param(17, 33, 20, torch.float64, 2, marks=pytest.mark.slow),
        pytest.param(65, 40, 33, torch.float32, 0, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_ids_match_float64(gpu, n, m, d, dtype, diagonal, ids):
    call = random_call(n, m, d, dtype, bias=-3.0, diagonal=diagonal, ids=ids, device=gpu.device)
    with gpu.triton():
        check(call)


def test_gradients_that_are_not_needed(gpu):
    call = random_call(20, 33, 24, torch.bfloat16, device=gpu.device)
    with gpu.triton():
        total, rows, columns, scale, bias = sigmoid_pairs_fwd(*call.operands, True, True, True, True)
        for needs in ((True, False), (False, True), (False, False)):
            again = sigmoid_pairs_fwd(*call.operands, True, True, *needs)
            assert torch.equal(again[1], rows if needs[0] else rows.new_empty(0))
            assert torch.equal(again[2], columns if needs[1] else rows.new_empty(0))
            for ours, right in zip((again[0], *again[3:]), (total, scale, bias), strict=True):
                torch.testing.assert_close(ours, right, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_panels_add_up(gpu, dtype, monkeypatch):
    """Scratch for one block of rows at a time gives the same gradients as scratch for all, in three panels."""
    call = random_call(300, 90, 136, dtype, scale=5.0, bias=-3.0, device=gpu.device)
    with gpu.triton():
        whole = sigmoid_pairs_fwd(*call.operands, True, True, True, True)
        losses = sigmoid_pairs_fwd(*call.operands, False, True, True, True)[0]
        monkeypatch.setattr(panels, "SCRATCH_BYTES", 1)
        parts = sigmoid_pairs_fwd(*call.operands, True, True, True, True)
        assert torch.equal(sigmoid_pairs_fwd(*call.operands, False, True, True, True)[0], losses)
    for ours, right in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-6)


def test_wide_products_are_summed_in_the_wider_type():
    """As they are on a card, by the shapes and types alone; the emulated kernels' are widened first."""
    half = torch.empty(6, 4, dtype=torch.bfloat16, device="meta")
    product = wide_product(half, half.T, torch.float32)
    assert product.dtype == torch.float32 and product.shape == (6, 6)
    if torch.__version__ >= torch.torch_version.TorchVersion("2.12"):  # 2.11 takes out_dtype for beta there
        assert wide_product(half, half.T, torch.float32, product) is product
    one = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    assert wide_product(one, one.T, torch.float32).item() == 4096
    total = torch.full((1, 1), 256.0)
    added = wide_product(one, one.T * 2**-12, torch.float32, total)
    assert added is total and total.item() == 257


def test_wide_products_add_in_one_operation():
    """A pass over the sums more would cost what the product saves."""
    operations = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(str(function))
            return function(*args, **(kwargs or {}))

    a, b, total = torch.ones(3, 2), torch.ones(2, 5), torch.ones(3, 5)
    with Watch():
        wide_product(a, b, torch.float32, total)
    assert operations == ["aten.addmm.out"] and torch.equal(total, torch.full((3, 5), 3.0))


def test_unsupported_calls_say_why(gpu):
    with gpu.triton():
        assert unsupported(torch.ones(4, 8, dtype=torch.bfloat16, device=gpu.device)) is None
        assert unsupported(torch.ones(4, 2048, device=gpu.device)) is None
        assert "empty" in unsupported(torch.ones(4, 0, dtype=torch.float16, device=gpu.device))
