"""`mixup_normalize`: 8-bit images to mixed, normalised numbers in one pass. docs/mixing.md has the contract."""

import torch

from ssl_kernels import backends
from ssl_kernels.chunked import mixing as chunked
from ssl_kernels.ops.library import define, implement_in_triton, library, where_it_runs
from ssl_kernels.reference import mixup_normalize as reference
from ssl_kernels.value_checks import check_on_cpu

_op = define(
    "mixup_normalize",
    "(Tensor x, Tensor lam, Tensor permutation, Tensor mean, Tensor std, ScalarType dtype) -> Tensor",
    lambda overload, x, lam, permutation, mean, std, dtype: torch.empty_like(x, dtype=dtype),
)

library.impl("mixup_normalize.chunked", chunked.mixup_normalize, "CompositeExplicitAutograd")
implement_in_triton(("mixup_normalize",), "ssl_kernels.triton.mixup_normalize")
backends.register_operation(
    "mixup_normalize", where_it_runs("mixup_normalize", "ssl_kernels.triton.mixup_normalize")
)


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
