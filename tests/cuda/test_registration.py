"""The extension offers the CUDA kernels to the dispatcher, under the schema of the operator."""

import pytest
import torch

from ssl_kernels import backends
from ssl_kernels.ops.operation import in_triton


@pytest.mark.parametrize("operator", in_triton)
def test_native_overload_has_a_cuda_kernel(operator):
    """What runs on GPUs in Triton does so in CUDA."""
    if backends.extension is None or not backends.extension.build_info()["cuda_architectures"]:
        pytest.skip("the extension was built without CUDA")
    name = f"ssl_kernels::{operator}.native"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
