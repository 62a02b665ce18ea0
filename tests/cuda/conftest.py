import functools
from pathlib import Path

import pytest

from tests.gpu_emulation.fixtures import gpu, nvcc

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


@functools.cache
def _library(gpu):
    return gpu.cuda_library([SOURCES / "contrastive.cu"])


@pytest.fixture
def library(gpu, nvcc):
    """The launchers of csrc/cuda/contrastive.h."""
    return _library(gpu)


__all__ = ["gpu", "nvcc"]
