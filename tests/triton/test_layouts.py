"""The Triton kernels take their tensors in every memory layout."""

import importlib
import importlib.util

import pytest
import torch

from tests.helpers import DTYPES
from tests.layouts import check, operators


def operation_of(name):
    return name.removesuffix("_fwd").removesuffix("_bwd").removesuffix("_")


ON_GPU = [
    name for name in operators() if importlib.util.find_spec(f"ssl_kernels.triton.{operation_of(name)}")
]


def run(name, *args):
    return getattr(importlib.import_module(f"ssl_kernels.triton.{operation_of(name)}"), name)(*args)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("operator", ON_GPU)
def test_layouts_of_side_inputs_change_no_bit(gpu, operator, dtype):
    with gpu.triton():
        seen = check(run, operator, dtype, gpu.device, main=["far apart"] if dtype == torch.float16 else [])
    assert seen == set(operators()[operator]), "a tensor that no call has"


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", ON_GPU)
def test_layouts_change_no_result(gpu, operator, dtype):
    with gpu.triton(seed=1):
        check(run, operator, dtype, gpu.device, unaligned=True)
