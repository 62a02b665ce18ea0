"""Builds the launchers of tests/cuda for the GPU present, all at once, before the tests ask for them one by one."""

import os
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.machine import CHECKOUT
from tests.gpu_emulation import build


def main():
    major, minor = torch.cuda.get_device_capability()
    sources = sorted((CHECKOUT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) // 2)) as pool:
        list(pool.map(lambda source: build.cuda_library([source], 10 * major + minor), sources))


if __name__ == "__main__":
    main()
