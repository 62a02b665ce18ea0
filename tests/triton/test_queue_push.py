"""The Triton kernels of `queue_push_`, as compiled code, against a ring in Python."""

import pytest
import torch
import torch.nn.functional as F

from ssl_kernels.triton.queue_push import queue_push_


def check(gpu, size, width, counts, storage_dtype, key_dtype, normalize, position=0):
    generator = torch.Generator().manual_seed(1)
    storage = torch.full((size, width), torch.nan, dtype=storage_dtype, device=gpu.device)
    expected = storage.cpu().clone()
    place, filled = (torch.tensor(value, device=gpu.device) for value in (position, 0))
    acc = torch.float64 if key_dtype == torch.float64 else torch.float32
    start, total = position, 0
    for count in counts:
        keys = torch.randn(count, width, generator=generator, dtype=torch.float64).to(key_dtype)
        wide = F.normalize(keys.to(acc), dim=1) if normalize else keys.to(acc)
        for b in range(count):
            expected[(start + b) % size] = wide[b].to(storage_dtype)
        start, total = (start + count) % size, min(size, total + count)
        queue_push_(storage, keys.to(gpu.device), place, filled, normalize)
        assert (int(place), int(filled)) == (start, total)
    eps = max(torch.finfo(storage_dtype).eps, 3e-7) if normalize else 0
    torch.testing.assert_close(storage.cpu(), expected, rtol=eps, atol=0, equal_nan=True)


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
