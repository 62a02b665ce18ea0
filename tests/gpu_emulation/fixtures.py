"""Fixtures for tests of GPU code; a conftest.py makes them known by importing them."""

import pytest

from . import build
from .runners import available_gpus


@pytest.fixture(params=available_gpus(), ids=lambda gpu: gpu.name)
def gpu(request):
    """Each runner in turn: emulated sm_80, emulated sm_90, or only the card where there is one."""
    return request.param


@pytest.fixture(scope="session")
def nvcc():
    """Path of nvcc; skips the test, with the reason, where there is none."""
    path = build.nvcc_path()
    if path is None:
        pytest.skip("nvcc not found: set CUDACXX or CUDA_HOME, or put nvcc on PATH")
    return path
