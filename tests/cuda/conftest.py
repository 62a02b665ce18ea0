import functools
from pathlib import Path

import pytest

from tests.gpu_emulation.fixtures import gpu, nvcc

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


@functools.cache
def _library(gpu, source):
    return gpu.cuda_library([SOURCES / source])


@pytest.fixture
def library(gpu, nvcc, request):
    """The launchers of csrc/cuda/contrastive.h, or of the file that the test module names as SOURCE."""
    return _library(gpu, getattr(request.module, "SOURCE", "contrastive.cu"))


@pytest.fixture
def library_of(gpu, nvcc):
    """The launchers of a file of csrc/cuda, by its name."""
    return functools.partial(_library, gpu)


__all__ = ["gpu", "nvcc"]
