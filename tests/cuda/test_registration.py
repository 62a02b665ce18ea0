"""The extension offers the CUDA kernels to the dispatcher, under the schema of the operator."""

import pytest
import torch

import ssl_kernels  # noqa: F401  defines the operators
from ssl_kernels import backends


@pytest.mark.parametrize(
    "operator",
    [
        "contrastive_fwd",
        "contrastive_bwd",
        *["sigmoid_pairs_fwd", "sigmoid_pairs_bwd", "batch_hard", "queue_push_", "momentum_update_"],
        *["row_pairs_fwd", "row_pairs_bwd"],
        *["mixup_", "mixup_fwd", "mixup_bwd"],
        *["cutmix_", "cutmix_fwd", "cutmix_bwd"],
        "mixup_normalize",
        *["mixup_cross_entropy_fwd", "mixup_cross_entropy_bwd"],
    ],
)
def test_native_overload_has_a_cuda_kernel(operator):
    if backends.extension is None or not backends.extension.build_info()["cuda_architectures"]:
        pytest.skip("the extension was built without CUDA")
    name = f"ssl_kernels::{operator}.native"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
