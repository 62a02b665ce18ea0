"""The Triton kernels of `queue_push_`, as compiled code, against a ring in Python."""

import pytest
import torch

from ssl_kernels.triton.queue_push import queue_push_
from tests.support.queue_push import Ring, keys_of


def check(gpu, size, width, counts, storage_dtype, key_dtype, normalize, position=0):
    ring = Ring(queue_push_, size, width, storage_dtype, gpu.device, position=position)
    for step, count in enumerate(counts):
        ring.push(keys_of(count, width, key_dtype, gpu.device, step), normalize)
    ring.check()


@pytest.mark.parametrize(
    "storage_dtype, key_dtype, normalize",
    [
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float32, False),
        (torch.float16, torch.float64, True),
        (torch.float64, torch.float64, True),
    ],
    ids=str,
)
def test_ring(gpu, storage_dtype, key_dtype, normalize):
    with gpu.triton():
        check(gpu, 7, 12, (3, 5, 0, 20), storage_dtype, key_dtype, normalize)


def test_wide_rows_and_sizes_of_one(gpu):
    with gpu.triton():
        check(gpu, 1, 1100, (1, 3), torch.bfloat16, torch.bfloat16, True)
        check(gpu, 5, 1, (4, 4), torch.float32, torch.float32, False, position=3)


def test_transposed_keys(gpu):
    storage = torch.zeros(8, 6, device=gpu.device)
    position, filled = (torch.tensor(0, device=gpu.device) for _ in range(2))
    keys = torch.randn(6, 4, device=gpu.device).T
    with gpu.triton():
        queue_push_(storage, keys, position, filled, False)
    assert torch.equal(storage[:4], keys) and int(filled) == 4
