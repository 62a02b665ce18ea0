"""Batch-norm shuffling of MoCo: rows change ranks before the key encoder, and their keys go back."""

from typing import Any

import torch

from ssl_kernels.checks import is_whole, short
from ssl_kernels.distributed import checks, groups
from ssl_kernels.ops.library import in_turn


def shuffle_rows(
    x: torch.Tensor, seed: int | None = None, *, group: Any = None, check: bool = True
) -> "tuple[torch.Tensor, Shuffle]":
    """Rows of all ranks in a random order, as many on each rank as before.

        shuffled, shuffle = shuffle_rows(images)
        keys = unshuffle_rows(key_encoder(shuffled), shuffle)      # keys[i] is the key of images[i]

    A rank's batch statistics are then over other samples than its queries'. One all-to-all moves exactly the rows that
    change ranks.

    Args:
        x: (n, ...) of this rank; ranks may differ in n. Gets its gradient.
        seed: Of the order, the same on every rank, as the number of the step; None: a number that rank 0 draws from
            torch's generator.
        group: Process group or DeviceMesh; None is the default group.
        check: Compare the ranks first. Without it they tell each other their numbers of rows alone.

    Returns:
        (rows (n, ...), the shuffle for `unshuffle_rows`).

    Raises:
        RuntimeError: torch.distributed is not initialised.
        TypeError, ValueError: x is no tensor with rows, seed no whole number, or the ranks differ.

    Source: He et al., MoCo, arXiv:1911.05722, section 3.3.
    """
    op = "shuffle_rows"
    group, ranks = groups.ranks_of(op, group)
    with checks.refusing(op, group, ranks, check):
        if not isinstance(x, torch.Tensor) or x.dim() == 0:
            raise TypeError(
                f"{op}: x must be a tensor with rows, got {getattr(x, 'shape', type(x).__name__)}"
            )
        if seed is not None and not is_whole(seed):
            raise TypeError(f"{op}: seed must be a whole number or None, got {type(seed).__name__}")
        checks.check_device_of_group(op, "x", x, group)
    drawn = int(torch.randint(2**31, ())) if seed is None and ranks.rank == 0 else 0
    told = [x.shape[0], drawn if seed is None else int(seed)]
    if check:
        facts = {
            "_told": told,
            "seed": seed,
            "shape of a row": list(x.shape[1:]),
            "dtype of x": short(x.dtype),
        }
        everyones = [theirs["_told"] for theirs in checks.compare(op, group, ranks, facts)]
    else:
        everyones = checks.exchange_counts(told, group, ranks)
    shuffle = Shuffle([theirs[0] for theirs in everyones], everyones[0][1], ranks)
    return _Moved.apply(x, shuffle, False), shuffle


def unshuffle_rows(x: torch.Tensor, shuffle: "Shuffle") -> torch.Tensor:
    """What was made of shuffled rows, a row each, on the ranks and in the order of the rows before `shuffle_rows`.

    Args:
        x: (n, ...), of any width; row i was made of row i that `shuffle_rows` returned.
        shuffle: What it returned beside them.

    Raises:
        ValueError: x has another number of rows.
    """
    if x.shape[0] != len(shuffle.own):
        raise ValueError(f"unshuffle_rows: x must have {len(shuffle.own)} rows, got {x.shape[0]}")
    return _Moved.apply(x, shuffle, True)


class Shuffle:
    """Which row goes where: the same permutation on every rank."""

    def __init__(self, sizes: list[int], seed: int, ranks: Any) -> None:
        self.name, world = ranks.name, ranks.world
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(sum(sizes), generator=generator)  # place p gets row order[p]
        ends = torch.tensor(sizes).cumsum(0)
        start = int(ends[ranks.rank]) - sizes[ranks.rank]
        own = slice(start, start + sizes[ranks.rank])
        self.own = order[own]  # global rows that come here, by place
        source = torch.searchsorted(ends, self.own, right=True)
        # They arrive source by source, in the order of their places.
        self.arrival = source.argsort(stable=True)
        self.received = torch.bincount(source, minlength=world).tolist()
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        goes_to = torch.searchsorted(ends, place[own], right=True)
        # Rows leave destination by destination, in the order of their places there.
        self.departure = place[own].argsort()
        self.sent = torch.bincount(goes_to, minlength=world).tolist()


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shuffle, back):
        ctx.shuffle, ctx.back = shuffle, back
        first, then = shuffle.departure.to(x.device), shuffle.arrival.to(x.device)
        received, sent = shuffle.received, shuffle.sent
        if back:
            first, then, received, sent = then, first, sent, received
        moved = groups.all_to_all_rows(x.index_select(0, first), received, sent, shuffle.name)
        return torch.empty_like(moved).index_copy_(0, then, moved)

    @staticmethod
    def backward(ctx, grad):
        (made,) = in_turn(lambda grad: (_Moved.apply(grad, ctx.shuffle, not ctx.back),), grad)
        return made, None, None
