"""Calls of `row_pairs` on any backend, and the rule by which its results are judged."""

from dataclasses import dataclass, replace

import torch

from ssl_kernels.reference.row_pairs import row_pairs as reference
from tests.helpers import random_rows


@dataclass
class Call:
    """The operands of one call; z is None for pairs."""

    x: torch.Tensor
    y: torch.Tensor
    z: torch.Tensor | None
    normalize: bool
    measure: str

    @property
    def acc(self):
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    @property
    def cotangent(self):
        return random_rows(len(self.x), 1, torch.float64, seed=3)[:, 0]

    @property
    def operands(self):
        return [rows for rows in (self.x, self.y, self.z) if rows is not None]

    @property
    def options(self):
        return {"normalize": self.normalize, "measure": self.measure}

    def with_operands(self, change):
        return replace(self, **dict(zip("xyz", (change(rows) for rows in self.operands), strict=False)))


def random_call(n, d, dtype=torch.float32, *, triplet=True, normalize=True, measure="distance", spread=0.5):
    """Rows that have about half of their length in common, as a pair's have."""
    common = random_rows(n, d, torch.float64, spread=spread)
    x, y, z = (common + random_rows(n, d, torch.float64, seed=k, spread=spread) for k in (1, 2, 3))
    x, y, z = (rows.to(dtype) for rows in (x, y, z))
    return Call(x, y, z if triplet else None, normalize, measure)


def results(run, call):
    """Values and the gradients by x, y and z."""
    leaves = [rows.detach().clone().requires_grad_() for rows in call.operands]
    values = run(*leaves, **call.options)
    return [values.detach(), *torch.autograd.grad(values, leaves, call.cotangent.to(values.dtype))]


def term_sums(call):
    """For each result the size of what its rounding errors are made of, float64."""
    g = call.cotangent.abs()[:, None]
    rows = [operand.double() for operand in call.operands]
    lengths = [operand.norm(dim=1, keepdim=True) for operand in rows]
    rnorms = [
        1 / length.clamp_min(1e-12) if call.normalize else torch.ones_like(length) for length in lengths
    ]
    x, *others = (operand * rnorm for operand, rnorm in zip(rows, rnorms, strict=True))
    x_length = x.norm(dim=1, keepdim=True)
    values, by_x, by_others = 0, 0, []
    for other in others:
        length = other.norm(dim=1, keepdim=True)
        if call.measure == "product":
            values = values + x_length * length
            by_x = by_x + length
            by_others.append(x_length)
        else:
            values = values + x_length + length
            # A direction is a difference, off by the rounding of the rows, over a distance.
            by_others.append((x_length + length) / (x - other).norm(dim=1, keepdim=True).clamp_min(1e-300))
            by_x = by_x + by_others[-1]
    return [values[:, 0], *(g * rnorm * size for rnorm, size in zip(rnorms, (by_x, *by_others), strict=True))]


def errors(found, truth, sums):
    pairs = zip(found, truth, sums, strict=True)
    return [
        ((ours.double() - value).abs() / (size + torch.finfo(ours.dtype).tiny)).max().item()
        for ours, value, size in pairs
    ]


def check_results(found, call, name):
    """About as accurate as plain PyTorch in the accumulation dtype, and of the contract's shapes and dtypes."""
    truth, sums = results(reference, call.with_operands(torch.Tensor.double)), term_sums(call)
    plain = errors(results(reference, call.with_operands(lambda rows: rows.to(call.acc))), truth, sums)
    stored = torch.finfo(call.x.dtype).eps / 2 if call.x.dtype != call.acc else 0
    roundings = 8 if call.acc == torch.float64 else 4  # of float64 the truth's own count too
    for k, error in enumerate(errors(found, truth, sums)):
        assert found[k].shape == truth[k].shape
        assert found[k].dtype == (call.x.dtype if k else torch.float64)
        allowed = 3 * plain[k] + roundings * torch.finfo(call.acc).eps + stored * (k > 0)
        assert error <= allowed, f"{name} result {k}: error {error:.2e}, plain PyTorch {plain[k]:.2e}"
