"""Operators on the CPU take their tensors in every memory layout."""

import pytest
import torch

from ssl_kernels import backends
from tests.helpers import DTYPES
from tests.layouts import check, operators


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["native", "chunked"])
@pytest.mark.parametrize("operator", operators())
def test_layouts_change_no_result(operator, backend, dtype):
    if backend == "native" and backends.extension is None:
        pytest.skip(backends.extension_missing)
    if backend == "native" and not torch._C._dispatch_has_kernel_for_dispatch_key(
        f"ssl_kernels::{operator}.native", "CPU"
    ):
        pytest.skip("no kernel of this operator, or of this schema, for the CPU")
    seen = check(lambda name, *args: getattr(_op(name), backend)(*args), operator, dtype, unaligned=True)
    assert seen == set(operators()[operator]), "a tensor that no call has"


def _op(name):
    return getattr(torch.ops.ssl_kernels, name)
