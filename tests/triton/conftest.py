from tests.gpu_emulation.fixtures import gpu

__all__ = ["gpu"]
