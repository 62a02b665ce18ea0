"""Permutations, shares and bounds that the tests of the mixing kernels share."""

import torch

PERMUTATIONS = ("random", "identity", "one cycle", "flip", "roll", "fixed points")


def permutation_of(kind, count, seed=0):
    """(count,) int64 of one of PERMUTATIONS."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "identity":
        return torch.arange(count)
    if kind == "flip":
        return torch.arange(count).flip(0)
    if kind == "roll":
        return torch.arange(count).roll(1)
    order = torch.randperm(count, generator=generator)
    if kind == "one cycle":
        permutation = torch.empty_like(order)
        permutation[order] = order.roll(-1)
        return permutation
    if kind == "fixed points":
        moved = order[: count // 2]
        permutation = torch.arange(count)
        permutation[moved] = moved.roll(1)
        return permutation
    return order


def shares_of(count, dtype, seed=0):
    """(count,) shares in [0, 1], some exactly 0 or 1, in the accumulation dtype of `dtype`."""
    generator = torch.Generator().manual_seed(seed + 1)
    lam = torch.rand(count, generator=generator, dtype=torch.float64)
    lam[torch.rand(count, generator=generator) < 0.1] = 0
    lam[torch.rand(count, generator=generator) < 0.1] = 1
    return lam.to(torch.float64 if dtype == torch.float64 else torch.float32)


def check_rounded_once(found, exact, terms, acc):
    """`found` is float64's `exact`, off by its own rounding and a few of acc's on `terms` at most."""
    exact, terms = exact.double(), terms.double()
    info = torch.finfo(found.dtype)
    stored = 0 if found.dtype == acc else info.eps / 2
    allowed = stored * exact.abs() + 3 * torch.finfo(acc).eps * terms + info.smallest_normal * info.eps
    error = (found.double() - exact).abs()
    worst = (error / allowed).max().item()
    assert worst <= 1, f"{worst:.3g} times the error of one rounding"


def boxes_of(count, height, width, seed=0):
    """(count, 4) int64 boxes (y0, y1, x0, x1) that overlap often; some empty, some the whole image."""
    generator = torch.Generator().manual_seed(seed + 2)
    ends = [torch.randint(0, size + 1, (count, 2), generator=generator) for size in (height, width)]
    boxes = torch.cat([end.sort(1).values for end in ends], 1)
    boxes[torch.rand(count, generator=generator) < 0.15] = torch.tensor([0, height, 0, width])
    boxes[torch.rand(count, generator=generator) < 0.1] = 0
    return boxes
