import pytest
import torch

from tests.gpu_emulation.fixtures import gpu

__all__ = ["gpu"]


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fills memory that torch.empty hands out with NaN, so that a result nobody wrote is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
