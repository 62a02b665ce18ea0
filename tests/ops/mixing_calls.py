"""Batches of every layout, permutations and shares for the mixing operations, and the rule for their errors."""

import torch
from hypothesis import strategies as st

BACKENDS = ("reference", "chunked", "native")  # those that run on the CPU
OPERATORS = ("chunked", "native")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "rotated", "batch_last", "every_other_sample", "cropped", "strided")
CANARY = 77.0


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_layout(values, layout):
    """(view with these values, the memory it is a view of); what the view leaves free holds `CANARY`."""
    shape = values.shape
    inner = tuple(range(1, values.dim()))
    if layout == "channels_last" and inner:
        order = (0, *inner[1:], 1)
    elif layout == "rotated" and inner:
        order = (0, inner[-1], *inner[:-1])
    elif layout == "batch_last":
        order = (*inner, 0)
    else:
        order = tuple(range(values.dim()))
    room = [shape[dim] for dim in order]
    cut = [slice(None)] * len(room)
    if layout == "every_other_sample":
        room[0] = 2 * room[0]
        cut[0] = slice(0, None, 2)
    elif layout == "cropped":
        room = [size + 3 for size in room]
        cut = [slice(1, 1 + shape[dim]) for dim in order]
    elif layout == "strided":
        room[-1] = 3 * room[-1]
        cut[-1] = slice(1, None, 3)
    memory = torch.full(room, CANARY, dtype=torch.float64).to(values.dtype)
    view = memory[tuple(cut)].permute([order.index(dim) for dim in range(len(order))])
    view.copy_(values)
    return view, memory


def untouched_outside(view, memory):
    """Whether the canaries around a view still hold their value."""
    view.fill_(CANARY)
    return bool((memory == torch.tensor(CANARY).to(memory.dtype)).all())


def random_batch(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if dtype == torch.bool:
        return torch.randint(2, shape, generator=generator).bool()
    return torch.randint(120, shape, generator=generator).to(dtype)


def random_lam(batch, dtype=torch.float32, seed=0):
    """Shares of which some are exactly 0 and 1."""
    generator = torch.Generator().manual_seed(seed + 3)
    lam = torch.rand(batch, generator=generator, dtype=torch.float64).to(accumulation(dtype))
    kind = torch.randint(6, (batch,), generator=generator)
    return lam.masked_fill(kind == 0, 0).masked_fill(kind == 1, 1)


def random_permutation(batch, seed=0):
    return torch.randperm(batch, generator=torch.Generator().manual_seed(seed + 5))


def permutations(batch):
    """By name: those that a kernel may get wrong."""
    here = torch.arange(batch)
    pairs = torch.arange(batch).view(-1, 2).flip(1).flatten() if batch % 2 == 0 else here.flip(0)
    return {
        "identity": here,
        "flip": here.flip(0),
        "roll": here.roll(1),
        "pairs": pairs,
        "random": random_permutation(batch),
    }


@st.composite
def calls(draw, least_dims=1, most_dims=5, largest_batch=9):
    """(shape, layout, seed): small batches of any number of dimensions."""
    dims = draw(st.integers(least_dims, most_dims))
    shape = [draw(st.integers(1, largest_batch)), *(draw(st.integers(1, 19)) for _ in range(dims - 1))]
    return tuple(shape), draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 1000))


def per_sample(values, x):
    return values.view(-1, *[1] * (x.dim() - 1))


def check_rounded_once(found, truth, term_sums, dtype):
    """Each number is off by its last rounding and a few roundings of its terms in the accumulation dtype."""
    assert found.dtype == dtype
    acc = torch.finfo(accumulation(dtype)).eps
    stored = 0 if dtype == accumulation(dtype) else torch.finfo(dtype).eps / 2
    allowed = 2 * acc * term_sums + stored * (1 + 1e-3) * truth.abs() + torch.finfo(dtype).tiny
    errors = (found.double() - truth).abs()
    assert (errors <= allowed).all(), f"error {(errors / allowed).max().item():.2f} times the allowed"
