"""The distributions that the mixing modules draw from."""

import torch


def beta(alpha, count, device, generator):
    """`count` numbers from Beta(alpha, alpha), float32; of two gammas in float64, which do not both vanish."""
    shape = torch.full((2, count), float(alpha), dtype=torch.float64, device=device)
    first, second = torch._standard_gamma(shape, generator=generator)
    return (first / (first + second)).float()


def span_around(centre, side, size):
    """Of a box of `side` times `size` around a centre drawn in [0, 1), what lies inside; begin and end."""
    half = torch.floor(size * side).long() // 2
    middle = torch.floor(size * centre).long()
    return (middle - half).clamp(0, size), (middle + half).clamp(0, size)


def span_within(place, side, size):
    """A box of `side` times `size` that lies inside, its place drawn in [0, 1); begin and end."""
    length = torch.floor(size * side).long()
    begin = torch.floor((size - length + 1) * place).long()
    return begin, begin + length
