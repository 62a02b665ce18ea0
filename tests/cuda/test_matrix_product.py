"""The product of matrices that the CUDA launchers leave to ATen, on pointers as they hand it over.

Without a GPU the very calls run on CPU tensors; only what CUDA alone has, half operands into float32, is stood in for.
"""

import ctypes
import traceback

import pytest
import torch

from ssl_kernels import backends
from tests.cuda import sigmoid_pairs_calls
from tests.cuda.contrastive_calls import check_parity
from tests.cuda.launching import DTYPE_CODES, MatrixProduct, MultiplyMatrices, accumulation_dtype
from tests.support import sigmoid_pairs as pairs
from tests.support.contrastive import random_call

pytestmark = pytest.mark.skipif(backends.extension is None, reason="needs the C++ extension")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def wider_results():
    """Lets the CPU multiply into another dtype, which torch does on CUDA alone."""
    if DEVICE.type == "cuda":
        yield
        return

    def mm(a, b, out_dtype, *, out):
        with torch.autocast("cpu", enabled=False):
            return out.copy_(a.to(out_dtype) @ b.to(out_dtype))

    def addmm(added, a, b, out_dtype, *, beta=1, alpha=1, out):
        assert added.dtype == out_dtype and (beta, alpha) == (1, 1)
        with torch.autocast("cpu", enabled=False):
            return out.copy_(added + a.to(out_dtype) @ b.to(out_dtype))

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm.dtype_out", mm, "CPU")
        library.impl("addmm.dtype_out", addmm, "CPU")
        yield


def in_wider_rows(matrix, stride):
    """The matrix at the start of rows that go on with NaN."""
    memory = torch.full((matrix.shape[0], stride), torch.nan, dtype=matrix.dtype, device=DEVICE)
    memory[:, : matrix.shape[1]] = matrix
    return memory


def multiply(a, b, result, m, n, k, *, transposed, add):
    product = MatrixProduct(
        DTYPE_CODES[a.dtype], transposed, add, m, n, k, a.stride(0), b.stride(0), result.stride(0),
        a.data_ptr(), b.data_ptr(), result.data_ptr(),
    )  # fmt: skip
    backends.extension.multiply_matrices(ctypes.addressof(product), DEVICE)


@pytest.mark.parametrize(
    "m, n, k, pad", [(1, 1, 1, 0), (1, 5, 3, 0), (7, 1, 130, 3), (64, 48, 33, 0), (33, 40, 1, 8)], ids=str
)
@pytest.mark.parametrize("add", [False, True], ids=["alone", "added"])
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_on_pointers(dtype, transposed, add, m, n, k, pad):
    """Any leading dimensions; nothing beside the matrices is read or written, and nothing of a result not added to."""
    generator = torch.Generator().manual_seed(m + k)
    acc = accumulation_dtype(dtype)
    a, b = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) for shape in ((m, k), (k, n)))
    before = torch.randn(m, n, generator=generator).to(DEVICE, acc) if add else a.new_full((m, n), torch.nan)
    exact = a.double() @ b.double() + (before.double() if add else 0)
    result = in_wider_rows(before.to(acc), n + pad)
    left = in_wider_rows(a.T if transposed else a, (m if transposed else k) + pad)
    multiply(left, in_wider_rows(b, n + pad), result, m, n, k, transposed=transposed, add=add)
    size = a.double().abs() @ b.double().abs() + 1
    assert ((result[:, :n].double() - exact).abs() / size).max() <= 4 * torch.finfo(acc).eps
    assert result[:, n:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mode", ["autocast", "inference", "no_grad"])
def test_products_in_any_mode(mode, dtype):
    """Autocast does not narrow them, and memory that autograd knows is written all the same."""
    a, b = (torch.randn(9, 9, generator=torch.Generator().manual_seed(i)).to(DEVICE, dtype) for i in range(2))
    exact, acc = a.double() @ b.double(), accumulation_dtype(dtype)
    a.requires_grad_()
    result = torch.zeros(9, 9, dtype=acc, device=DEVICE)
    with {
        "autocast": torch.autocast(DEVICE.type, torch.bfloat16),
        "inference": torch.inference_mode(),
        "no_grad": torch.no_grad(),
    }[mode]:
        multiply(a, b, result, 9, 9, 9, transposed=False, add=False)
        multiply(a, b, result, 9, 9, 9, transposed=False, add=True)
    torch.testing.assert_close(result.double(), 2 * exact, rtol=0, atol=100 * torch.finfo(acc).eps)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU")
def test_tf32_is_torchs_choice():
    a, b = (torch.randn(256, 256, device=DEVICE) for _ in range(2))
    exact, errors = a.double() @ b.double(), []
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            result = torch.empty_like(a)
            multiply(a, b, result, 256, 256, 256, transposed=False, add=False)
            errors.append((result - exact).abs().max().item())
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors[0] < 1e-4 < errors[1] < 0.1


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU")
def test_products_in_a_cuda_graph():
    """On the current stream: what a graph has captured is made again of other numbers."""
    a, b, result = (torch.randn(64, 64, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    result = result.float()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        multiply(a, b, result, 64, 64, 64, transposed=True, add=False)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        multiply(a, b, result, 64, 64, 64, transposed=True, add=False)
    a.copy_(torch.randn_like(a))
    graph.replay()
    torch.testing.assert_close(result, a.float().T @ b.float(), rtol=1e-4, atol=1e-4)


def by_aten(device, stream):
    """As the operators hand it to their launchers."""

    def multiply(pointer, handle):
        try:
            backends.extension.multiply_matrices(ctypes.addressof(pointer.contents), device)
        except Exception:  # nothing may leave a function that C calls
            traceback.print_exc()
            return 999
        return 0

    return MultiplyMatrices(multiply)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_wide_rows_by_aten(library_of, gpu, dtype):
    """Gradients of both sides in blocks, and the expectation, through the very calls that users' gradients take."""
    library = library_of("contrastive.cu")
    call = random_call(131, 135, 264, dtype, both_directions=True, device=gpu.device)
    check_parity(library, call, blocks=(1, 1), multiply=by_aten)
    call = random_call(20, 140, 520, dtype, device=gpu.device)
    check_parity(library, call, blocks=(1, 1), expectation=True, multiply=by_aten)
    call = pairs.random_call(131, 135, 264, dtype, device=gpu.device)
    sigmoid_pairs_calls.check_parity(library_of("sigmoid_pairs.cu"), call, blocks=(1, 1), multiply=by_aten)
