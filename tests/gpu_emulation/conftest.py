from tests.gpu_emulation.fixtures import gpu, nvcc

__all__ = ["gpu", "nvcc"]
