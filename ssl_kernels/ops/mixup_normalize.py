"""`mixup_normalize`: 8-bit images to mixed, normalised numbers in one pass. docs/mixing.md has the contract."""

import torch

from ssl_kernels import backends
from ssl_kernels.checks import check_on_cpu
from ssl_kernels.chunked import mixing as chunked
from ssl_kernels.ops.operation import Operation
from ssl_kernels.reference import mixup_normalize as reference

_operation = Operation(
    "mixup_normalize",
    chunked,
    {
        "": (
            "(Tensor x, Tensor lam, Tensor permutation, Tensor mean, Tensor std, ScalarType dtype) -> Tensor",
            lambda x, lam, permutation, mean, std, dtype: torch.empty_like(x, dtype=dtype),
        )
    },
)
(_op,) = _operation.operators


def mixup_normalize(x, lam, permutation, mean, std, dtype, *, backend=None):
    """((λ_i x_i + (1 − λ_i) x_p(i)) / 255 − mean) / std. What the public function checks holds here already.

    Args:
        x: (B, C, H, W) uint8.
        lam: (B,) float32.
        permutation: (B,) int64.
        mean, std: (C,) float32.
        dtype: float32, float16 or bfloat16.
        backend: One of `backends.BACKENDS`, or None.
    """
    chosen = backends.choose_backend("mixup_normalize", backend, "mixup_normalize", x)
    if chosen == "reference":
        check_on_cpu("mixup_normalize", permutation, lam)
        return reference.mixup_normalize(x, lam, permutation, mean, std, dtype)
    return _op[chosen](x, lam, permutation, mean, std, dtype)
