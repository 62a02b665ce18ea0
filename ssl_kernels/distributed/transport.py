"""How the rows of the other ranks come by: all at once (`Gather`) or block after block (`Ring`).

Both walk over blocks of rows, the own one first. What a visit of a block finds for the rows of that block is merged
over the ranks that visit it and delivered to the rank they belong to.

A symmetric walk visits every pair of blocks at one of its two ranks only: rank r visits those of the ranks r + 1 to
r + (W − 1) // 2, and where W is even the pair of r and r + W / 2 is divided between the two.
"""

import torch
from torch import distributed as dist

from ssl_kernels.distributed import groups

EVERY = slice(None)


class Sum:
    """Parts that add up."""

    @staticmethod
    def nothing(like, rows):
        return [like_part.new_zeros(rows, *like_part.shape[1:]) for like_part in like]

    @staticmethod
    def merge(total, part):
        for ours, theirs in zip(total, part, strict=True):
            ours += theirs

    @staticmethod
    def delivered(parts, sizes, rank, name):
        if parts[0].is_cuda:
            return [groups.reduce_scatter_rows(part, sizes, rank, name) for part in parts]
        # gloo's reduce-scatter is an all-reduce, which moves twice as much (findings/).
        return [groups.exchange_rows(part, sizes, rank, name).sum(0) for part in parts]


class LogSum:
    """Parts that are log-sum-exps of disjoint terms, and behind them means under the softmax over those terms."""

    @staticmethod
    def nothing(like, rows):
        lse, *means = like
        return [lse.new_full((rows,), -torch.inf), *(mean.new_zeros(rows, *mean.shape[1:]) for mean in means)]

    @staticmethod
    def merge(total, part):
        merged = torch.logaddexp(total[0], part[0])
        for ours, theirs in zip(total[1:], part[1:], strict=True):
            ours *= share(total[0], merged)[:, None].to(ours.dtype)
            ours += share(part[0], merged)[:, None].to(ours.dtype) * theirs
        total[0].copy_(merged)

    @staticmethod
    def delivered(parts, sizes, rank, name):
        lses, *means = (groups.exchange_rows(part, sizes, rank, name) for part in parts)  # (W, n, ...)
        lse = torch.logsumexp(lses, 0)
        shares = share(lses, lse)[:, :, None]
        return [lse, *((shares.to(mean.dtype) * mean).sum(0) for mean in means)]


def share(lse, merged):
    """exp(lse − merged): 0 where nothing was summed."""
    return torch.exp(lse - merged).masked_fill(lse == -torch.inf, 0)


def _halves(rank, peer, own, theirs):
    """Which rows of both this rank multiplies where the pair is divided: (own slice, slice of the peer's)."""
    if rank < peer:
        return EVERY, slice(0, theirs // 2)
    return slice(own // 2, own), EVERY


class Gather:
    """All rows on every rank, by one all-gather; results by an all-to-all, or on GPUs a reduce-scatter."""

    def __init__(self, group, ranks, sizes):
        self.ranks, self.sizes = ranks, sizes

    def collect(self, *tensors):
        """The rows of all ranks, from the own on, which come first."""
        return [groups.all_gather_rows(t, self.sizes, self.ranks.name, self.ranks.rank) for t in tensors]

    def walk(self, held, visit, combine=None, like=(), symmetric=False):
        """Visit the blocks of what `collect` returned.

        Args:
            held: Tensors with the rows of all ranks.
            visit: visit(block, own, is_first): the tensors' rows of a block, a slice of this rank's rows they are to
                meet, and whether the block begins with (symmetric: is) this rank's own. Returns what it found for the
                rows of the block, a list as `like`, or None for nothing.
            combine: `Sum` or `LogSum`, for what visits return; None if that is nothing.
            like: Tensors without rows of the width and dtype of what visits return.
            symmetric: See above. What the visit of the own block finds for this rank's rows is not returned.

        Returns:
            What all ranks' visits together found for this rank's rows, a list of tensors, or None without `combine`.
        """
        rank, world = self.ranks.rank, self.ranks.world
        if not symmetric:
            parts = visit(held, EVERY, True)
            return self._deliver(parts, combine) if combine else None
        ends = [0]
        for k in range(world):
            ends.append(ends[-1] + self.sizes[(rank + k) % world])
        own = ends[1]
        spans = [(EVERY, ends[1], ends[(world + 1) // 2])]
        if world % 2 == 0:
            middle = world // 2
            rows, of_theirs = _halves(rank, (rank + middle) % world, own, ends[middle + 1] - ends[middle])
            if rows == EVERY:
                spans = [(EVERY, ends[1], ends[middle] + of_theirs.stop)]
            else:
                spans.append((rows, ends[middle], ends[middle + 1]))
        visit([tensor[:own] for tensor in held], EVERY, True)
        everyones = combine.nothing(like, ends[-1]) if combine else None
        for rows, start, stop in spans:
            if start < stop:
                parts = visit([tensor[start:stop] for tensor in held], rows, False)
                if parts is not None:
                    combine.merge([part[start:stop] for part in everyones], parts)
        return self._deliver(everyones, combine) if combine else None

    def _deliver(self, parts, combine):
        before = sum(self.sizes[: self.ranks.rank])
        in_rank_order = [torch.roll(part, before, 0) for part in parts]
        return combine.delivered(in_rank_order, self.sizes, self.ranks.rank, self.ranks.name)


class Ring:
    """Blocks of rows that travel from rank to rank, by grouped point-to-point, while the block before is visited.

    Block q goes to rank q − 1, q − 2 and so on, and with it, one transfer behind, what its visits found so far; the
    last of them sends that home.
    """

    def __init__(self, group, ranks, sizes):
        self.group, self.ranks, self.sizes = group, ranks, sizes

    def collect(self, *tensors):
        """The tensors themselves: rows are fetched during the walk."""
        return [tensor.contiguous() for tensor in tensors]

    def walk(self, held, visit, combine=None, like=(), symmetric=False):
        """As `Gather.walk`; visits meet one block each. Memory is that of a few blocks whatever the number of ranks."""
        rank, world = self.ranks.rank, self.ranks.world
        last = world // 2 if symmetric else world - 1
        left, right = (rank - 1) % world, (rank + 1) % world
        places = [self._places(held) for _ in range(2)]
        finds = [self._places(like) for _ in range(2)]
        block, found = held, None
        for step in range(last + 1):
            owner = (rank + step) % world
            sends, receives, ahead, passed = [], [], None, None
            if step < last:
                ahead = self._of(places[step % 2], (owner + 1) % world)
                sends += [(tensor, left) for tensor in block]
                receives += [(tensor, right) for tensor in ahead]
            if combine and step > symmetric:  # a symmetric walk finds nothing for others at step 0
                # What this rank found at the last step goes on; of this block, what the right one found comes.
                passed = self._of(finds[step % 2], owner)
                sends += [(tensor, left) for tensor in found]
                receives += [(tensor, right) for tensor in passed]
            transfer = self._start(sends, receives)

            rows, of_theirs = EVERY, EVERY
            if symmetric and step and 2 * step == world:
                rows, of_theirs = _halves(rank, owner, self.sizes[rank], self.sizes[owner])
            parts = visit([tensor[of_theirs] for tensor in block], rows, step == 0)
            self._finish(transfer)
            if combine and step >= symmetric:
                found = passed
                if found is None:
                    found = self._of(finds[step % 2], owner)
                    for place, nothing in zip(found, combine.nothing(like, 1), strict=True):
                        place.copy_(nothing.expand_as(place))
                if parts is not None:
                    combine.merge([part[of_theirs] for part in found], parts)
            block = ahead
            del parts
        if not combine:
            return None
        mine = self._of(finds[(last + 1) % 2], rank)
        to, source = (rank + last) % world, (rank - last) % world
        self._finish(self._start([(t, to) for t in found], [(t, source) for t in mine]))
        return mine

    def _places(self, like):
        """Room for the largest block of tensors like these."""
        return [tensor.new_empty(max(self.sizes), *tensor.shape[1:]) for tensor in like]

    def _of(self, places, owner):
        return [place[: self.sizes[owner]] for place in places]

    def _start(self, sends, receives):
        """Begin the transfers as one group, in which no order of the ranks can lock. Empty blocks are not sent."""
        transfers = [
            dist.P2POp(kind, tensor, dist.get_global_rank(self.group, peer), self.group)
            for kind, all_of_kind in ((dist.isend, sends), (dist.irecv, receives))
            for tensor, peer in all_of_kind
            if tensor.numel()
        ]
        return dist.batch_isend_irecv(transfers) if transfers else []

    @staticmethod
    def _finish(works):
        for work in works:
            work.wait()


TRANSPORTS = {"gather": Gather, "ring": Ring}
