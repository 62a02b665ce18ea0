"""Calls csrc/cuda/queue_push.h on tensors, beside a ring in Python."""

import ctypes

import torch
import torch.nn.functional as F

from tests.cuda.launching import DTYPE_CODES, accumulation_dtype, strides
from tests.gpu_emulation import STREAM


class Args(ctypes.Structure):
    _fields_ = [
        *[(name, ctypes.c_int32) for name in ("storage_dtype", "key_dtype", "normalize", "reserved")],
        *[(name, ctypes.c_int64) for name in ("K", "B", "D")],
        ("key_strides", ctypes.c_int64 * 2),
        *[(name, ctypes.c_void_p) for name in ("storage", "keys", "position", "filled")],
    ]


class Ring:
    """A queue on the device, and the same in Python."""

    def __init__(self, library, size, width, dtype, device, *, position=0, filled=0):
        self.library = library
        self.storage = torch.full((size, width), torch.nan, dtype=dtype, device=device)
        self.expected = self.storage.cpu().clone()
        self.position, self.filled = (
            torch.tensor(value, dtype=torch.int64, device=device) for value in (position, filled)
        )

    def push(self, keys, normalize, **options):
        size = len(self.storage)
        acc = accumulation_dtype(keys.dtype)
        wide = keys.cpu().to(acc)
        wide = F.normalize(wide, dim=1) if normalize else wide
        start, filled = int(self.position), max(0, int(self.filled))
        for b, row in enumerate(wide):
            self.expected[(start + b) % size] = row.to(self.storage.dtype)
        args = Args(
            storage_dtype=DTYPE_CODES[self.storage.dtype],
            key_dtype=DTYPE_CODES[keys.dtype],
            normalize=normalize,
            K=size,
            B=len(keys),
            D=self.storage.shape[1],
            key_strides=strides(keys),
            storage=self.storage.data_ptr(),
            keys=keys.data_ptr(),
            position=self.position.data_ptr(),
            filled=self.filled.data_ptr(),
        )
        writes = {"storage": self.storage, "position": self.position, "filled": self.filled}
        buffers = {**writes, "keys": keys}
        launches = self.library.call(
            "queue_push", ctypes.byref(args), STREAM, buffers=buffers, read_only={"keys"}, **options
        )
        assert int(self.position) == (start + len(keys)) % size
        assert int(self.filled) == min(size, filled + len(keys))
        return launches

    def check(self, *, exact=False):
        eps = torch.finfo(self.storage.dtype).eps
        got = self.storage.cpu()
        if exact:
            assert torch.equal(got.nan_to_num(-7.0), self.expected.nan_to_num(-7.0))
        torch.testing.assert_close(got, self.expected, rtol=max(eps, 3e-7), atol=0, equal_nan=True)


def keys_of(count, width, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype).to(device)
