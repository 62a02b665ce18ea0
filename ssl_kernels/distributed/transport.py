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
    def on_the_way(part):
        """Whether parts are added as they travel, by a reduce-scatter."""
        return part.is_cuda  # gloo's is an all-reduce, which moves twice as much (findings/)

    @staticmethod
    def send(parts, sizes, rank, name):
        """Begin to deliver `parts` of the other ranks' rows, in rank order."""
        if not Sum.on_the_way(parts[0]):
            return [groups.start_exchange(part, sizes, rank, name) for part in parts]
        before = sum(sizes[:rank])
        started = []
        for part in parts:
            own = part.new_zeros(sizes[rank], *part.shape[1:])
            of_all = torch.cat((part[:before], own, part[before:]))
            started.append(groups.start_reduce_scatter(of_all, sizes, name))
        return started

    @staticmethod
    def receive(started, own, sizes, rank):
        """The parts of all ranks for this rank's rows; `own` are its own, or None, and are written over."""
        found = [groups.wait(part) for part in started]
        if Sum.on_the_way(found[0]):
            found = [part[: sizes[rank]] for part in found]
        else:
            found = [_by_rank(part, sizes, rank).sum(0) if len(sizes) > 2 else part for part in found]
        return found if own is None else [ours.add_(part) for ours, part in zip(own, found, strict=True)]


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
    def send(parts, sizes, rank, name):
        return [groups.start_exchange(part, sizes, rank, name) for part in parts]

    @staticmethod
    def receive(started, own, sizes, rank):
        found = [_by_rank(groups.wait(part), sizes, rank) for part in started]
        if own is not None:
            found = [torch.cat((ours[None], part)) for ours, part in zip(own, found, strict=True)]
        lses, *means = found  # (W, n, ...) or (W - 1, n, ...)
        lse = torch.logsumexp(lses, 0)
        shares = share(lses, lse)[:, :, None]
        return [lse, *((shares.to(mean.dtype) * mean).sum(0) for mean in means)]


def share(lse, merged):
    """exp(lse − merged): 0 where nothing was summed."""
    return torch.exp(lse - merged).masked_fill(lse == -torch.inf, 0)


def _by_rank(rows, sizes, rank):
    """(W - 1, own rows, ...) of what `groups.start_exchange` brought."""
    return rows.view(len(sizes) - 1, sizes[rank], *rows.shape[1:])


def _halves(rank, peer, own, theirs):
    """Which rows of both this rank multiplies where the pair is divided: (own slice, slice of the peer's)."""
    if rank < peer:
        return EVERY, slice(0, theirs // 2)
    return slice(own // 2, own), EVERY


class Gather:
    """All rows on every rank, by one all-gather; results by an all-to-all, or on GPUs a reduce-scatter.

    The own rows are visited while the others' are on their way.
    """

    def __init__(self, group, ranks, sizes):
        self.ranks, self.sizes = ranks, sizes

    def collect(self, *tensors):
        """For each tensor itself and, on their way, the rows of the others."""
        held = []
        for tensor in tensors:
            held += [tensor, (groups.start_all_gather(tensor, self.sizes, self.ranks.name),)]
        return held

    def walk(self, held, visit, combine=None, like=(), symmetric=False, own_last=False, at_once=False):
        """Visit the blocks of what `collect` returned.

        Args:
            held: What `collect` returned. What was on its way is replaced by what came.
            visit: visit(block, own, is_first): the tensors' rows of a block, a slice of this rank's rows they are to
                meet, and whether the block is this rank's own. Returns what it found for the rows of the block, a list
                as `like`, or None for nothing.
            combine: `Sum` or `LogSum`, for what visits return; None if that is nothing.
            like: Tensors without rows of the width and dtype of what visits return.
            symmetric: See above. What the visit of the own block finds for this rank's rows is not returned.
            own_last: Visit the own block last, while what was found for the others is on its way.
            at_once: Visit all rows as one block, of which the own come first; in backward if so in forward. For what a
                visit keeps for backward that holds for the sum over all rows alone.

        Returns:
            What all ranks' visits together found for this rank's rows, a list of tensors, or None without `combine`.
        """
        rank, sizes = self.ranks.rank, self.sizes
        for_own = None if own_last or at_once else visit(held[::2], EVERY, True)
        for place, each in enumerate(held):
            if isinstance(each, tuple):
                held[place] = groups.rows_of_others(*each, sizes, rank)
                if at_once:
                    held[place - 1], held[place] = torch.cat(held[place - 1 : place + 1]), None
        if at_once:
            found = visit(held[::2], EVERY, True)
            if not combine:
                return None
            for_own, found = zip(*(part.tensor_split((sizes[rank],)) for part in found), strict=True)
            started = combine.send(self._in_rank_order(found), sizes, rank, self.ranks.name)
            return combine.receive(started, [part.clone() for part in for_own], sizes, rank)
        others = sum(sizes) - sizes[rank]
        found, start = [], 0
        for rows, stop in self._spans() if symmetric else [(EVERY, others)]:
            if start < stop:
                parts = visit([tensor[start:stop] for tensor in held[1::2]], rows, False)
                found.append(combine.nothing(like, stop - start) if combine and parts is None else parts)
                start = stop
        if combine:
            if start < others or not others:
                found.append(combine.nothing(like, others - start))
            found = [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*found, strict=True)]
            started = combine.send(self._in_rank_order(found), sizes, rank, self.ranks.name)
        if own_last:
            for_own = visit(held[::2], EVERY, True)
        return combine.receive(started, None if symmetric else for_own, sizes, rank) if combine else None

    def _spans(self):
        """[(which own rows meet them, where they end among the others' rows)] of a symmetric walk."""
        rank, world = self.ranks.rank, self.ranks.world
        ends = [0]
        for k in range(1, world):
            ends.append(ends[-1] + self.sizes[(rank + k) % world])
        whole = ends[(world - 1) // 2]
        if world % 2:
            return [(EVERY, whole)]
        peer = (rank + world // 2) % world
        rows, of_theirs = _halves(rank, peer, self.sizes[rank], self.sizes[peer])
        if rows == EVERY:
            return [(EVERY, whole + of_theirs.stop)]
        return [(EVERY, whole), (rows, ends[world // 2])]

    def _in_rank_order(self, parts):
        """Rows of the others, of those behind this rank first, in the order of the ranks."""
        behind = sum(self.sizes[self.ranks.rank + 1 :])
        return [
            torch.cat((part[behind:], part[:behind])) if 0 < behind < part.shape[0] else part
            for part in parts
        ]


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

    def walk(self, held, visit, combine=None, like=(), symmetric=False, own_last=False, at_once=False):
        """As `Gather.walk`, but the own block is always the first; visits meet a block each, or half of one.

        Memory is that of a few blocks whatever the number of ranks.
        """
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

            rows, spans = EVERY, [EVERY]
            if symmetric and step and 2 * step == world:
                rows, of_theirs = _halves(rank, owner, self.sizes[rank], self.sizes[owner])
                spans = [of_theirs]
            elif step:  # by halves, so that a visit works in as much memory as that of a divided pair
                half = self.sizes[owner] // 2
                spans = [slice(0, half), slice(half, None)]
            parts = [visit([tensor[span] for tensor in block], rows, step == 0) for span in spans]
            self._finish(transfer)
            if combine and step >= symmetric:
                found = passed
                if found is None:
                    found = self._of(finds[step % 2], owner)
                    for place, nothing in zip(found, combine.nothing(like, 1), strict=True):
                        place.copy_(nothing.expand_as(place))
                for span, part in zip(spans, parts, strict=True):
                    if part is not None:
                        combine.merge([each[span] for each in found], part)
            block = ahead
            part = parts = None
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
