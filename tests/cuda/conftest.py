import functools
from pathlib import Path

import pytest

from tests.gpu_emulation.fixtures import gpu, nvcc

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


@functools.cache
def _library(gpu, *sources):
    return gpu.cuda_library([SOURCES / source for source in sources])


@pytest.fixture
def library(gpu, nvcc, request):
    """The launchers of csrc/cuda/contrastive.cu, or of the file or files that the test module names as SOURCE."""
    source = getattr(request.module, "SOURCE", "contrastive.cu")
    return _library(gpu, *((source,) if isinstance(source, str) else source))


@pytest.fixture
def library_of(gpu, nvcc):
    """The launchers of a file of csrc/cuda, by its name."""
    return functools.partial(_library, gpu)


__all__ = ["gpu", "nvcc"]
