"""A queue beside the same ring in Python, which judges every backend of `queue_push_`."""

import torch
import torch.nn.functional as F


class Ring:
    """`push(storage, keys, position, filled, normalize, **options)` is the backend's."""

    def __init__(self, push, size, width, dtype=torch.float32, device="cpu", *, position=0, filled=0):
        self._push = push
        self.storage = torch.full((size, width), torch.nan, dtype=dtype, device=device)
        self.expected = torch.full((size, width), torch.nan, dtype=torch.float64)
        self.position, self.filled = (torch.tensor(value, device=device) for value in (position, filled))
        self._rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float64 else 0

    def push(self, keys, normalize, **options):
        """Returns what the backend's returns."""
        size, start, filled = len(self.storage), int(self.position), max(0, int(self.filled))
        wide = keys.cpu().double()
        for b, row in enumerate(F.normalize(wide, dim=1) if normalize else wide):
            self.expected[(start + b) % size] = row
        if normalize:
            eps = (
                torch.finfo(keys.dtype).eps if keys.dtype == torch.float64 == self.storage.dtype else 2.0**-24
            )
            self._rounding = max(self._rounding, 4 * eps)
        result = self._push(self.storage, keys, self.position, self.filled, normalize, **options)
        assert int(self.position) == (start + len(keys)) % size
        assert int(self.filled) == min(size, filled + len(keys))
        return result

    def check(self):
        """Normalised once, and rounded once; keys as they are to the bit where nothing was normalised."""
        found, info = self.storage.cpu().double(), torch.finfo(self.storage.dtype)
        allowed = 1.01 * self._rounding * self.expected.abs() + info.smallest_normal * info.eps
        here = self.expected.isfinite()
        assert torch.equal(found.isnan(), self.expected.isnan())
        assert ((found - self.expected).abs() <= allowed)[here].all()


def keys_of(count, width, dtype, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64).to(dtype).to(device)
