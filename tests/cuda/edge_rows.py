"""Rows at the edges of what kernels promise: short ones, and those that cannot be read in vectors."""

import torch

from tests.cuda.mutation import require
from tests.support.queue_push import keys_of

# Norms beside 1e-12, where a row begins to be normalised rather than scaled.
SHORT = (0.97e-12, 1.03e-12)


def short_rows(count, width, dtype):
    """Rows of the norms `SHORT` in turn, in directions of their own."""
    rows = torch.nn.functional.normalize(keys_of(count, width, torch.float64), dim=1)
    lengths = torch.tensor(SHORT, dtype=torch.float64)[torch.arange(count) % 2]
    return (rows * lengths[:, None]).to(dtype)


def odd_address(tensor):
    """The same values one element into their memory."""
    memory = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    return memory[1:].view(tensor.shape).copy_(tensor)


def awkward_rows(rows):
    """The same rows where 16 bytes cannot be read at a time: for the address alone, the stride of columns alone."""
    n, d = rows.shape
    at_an_odd_address = torch.zeros(n, d + 8, dtype=rows.dtype)[:, 1 : d + 1].copy_(rows)
    return at_an_odd_address, torch.zeros(n, 2 * d, dtype=rows.dtype)[:, ::2].copy_(rows)


def in_padded_rows(rows):
    """The same rows, of an odd width, a multiple of 16 bytes apart and NaN between them."""
    n, d = rows.shape
    return torch.full((n, -(-d // 8) * 8), torch.nan, dtype=rows.dtype)[:, :d].copy_(rows)


def require_halves(found, exact):
    """Gradients beyond float16's numbers are infinite, the others are numbers."""
    beyond, within = exact.abs() > 66000, exact.abs() < 65000
    require(beyond.any() and within.any(), "nothing on one side of float16's end")
    require(torch.equal(found[beyond].double(), exact[beyond].sign() * torch.inf), "clamped")
    require(found[within].isfinite().all(), "not finite")
