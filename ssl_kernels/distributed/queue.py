"""A queue of MoCo that the ranks of a group divide."""

import torch
from torch import nn
from torch.distributed.distributed_c10d import _resolve_process_group

from ssl_kernels.checks import shape_error, short
from ssl_kernels.distributed import checks, groups
from ssl_kernels.losses._labels import as_ids
from ssl_kernels.nn.counters import after_apply
from ssl_kernels.nn.queue import MoCoQueue
from ssl_kernels.ops.queue_push import queue_push_

OP = "MoCoQueue"


def class_for(group):
    """What `MoCoQueue(group=group)` is: of one rank, the plain queue."""
    _, ranks = groups.ranks_of(OP, group)
    return MoCoQueue if ranks.world == 1 else ShardedMoCoQueue


class ShardedMoCoQueue(MoCoQueue):
    """`nn.MoCoQueue(..., group=)`: rank r has the rows from K r // W on.

    Its rows are no buffer: DistributedDataParallel would overwrite them with those of rank 0. Position and fill count
    are, and are the same on every rank.
    """

    def _make_storage(self, size, dim, group, **kind):
        _, ranks = groups.ranks_of(OP, group)
        if size < ranks.world:
            raise ValueError(f"{OP}: size must be at least the {ranks.world} ranks of group, got {size}")
        self.group_name = ranks.name  # a process group itself could not be copied with the module
        self.size, self.rank = size, ranks.rank
        self.bounds = [size * rank // ranks.world for rank in range(ranks.world + 1)]
        self.shard = torch.zeros(self.rows, dim, **kind)
        self.shard_ids = None

    def _make_ids(self, size, device):
        self.shard_ids = torch.zeros(self.rows, dtype=torch.int64, device=device)

    @property
    def has_ids(self):
        return self.shard_ids is not None

    @property
    def ranks(self):
        return groups.Ranks(self.rank, len(self.bounds) - 1, self.group_name)

    @property
    def storage(self):
        """This rank's rows."""
        return self.shard

    @property
    def first(self):
        """Where in the queue this rank's rows begin."""
        return self.bounds[self.rank]

    @property
    def rows(self):
        return self.bounds[self.rank + 1] - self.first

    @property
    def sizes(self):
        """How many rows each rank has."""
        return tuple(end - start for start, end in zip(self.bounds, self.bounds[1:], strict=False))

    @property
    def filled_shard(self):
        """This rank's rows that hold keys."""
        return self.shard[: min(max(len(self) - self.first, 0), self.rows)]

    @property
    def filled_ids(self):
        """Their ids."""
        return self.shard_ids[: self.filled_shard.shape[0]]

    @property
    def keys(self):
        """The filled rows of all ranks, (len(queue), D): every rank calls it."""
        return self._whole(self.shard)[: len(self)]

    @property
    def ids(self):
        """The ids of all rows of all ranks, (size,): every rank calls it."""
        return self._whole(self.shard_ids)

    def negatives(self, queries):
        raise ValueError(f"{OP}: a queue with a group must be given to ssl_kernels.distributed.moco_loss")

    @torch.no_grad()
    def push_(self, keys, ids=None):
        """Write the keys of all ranks, rank after rank, over the oldest rows: each goes to the rank that keeps it.

        Every rank calls it, each with its own (B, D) keys, of any B, and B ids if and only if the queue holds ids.
        Returns the queue. Raises TypeError or ValueError on every rank where one rank's do not fit, or widths, dtypes
        or the state of the queue differ; nothing was written then.
        """
        dim, ranks = self.shard.shape[1], self.ranks
        group = _resolve_process_group(self.group_name)
        with checks.refusing(OP, group, ranks):
            self._check_whether_ids(ids)
            if not isinstance(keys, torch.Tensor) or keys.dim() != 2:
                got = tuple(keys.shape) if isinstance(keys, torch.Tensor) else type(keys).__name__
                raise ValueError(f"{OP}: keys must have shape (B, {dim}), got {got}")
            if ids is not None:
                ids = as_ids(f"{OP}.push_", "ids", ids, keys.shape[:1], self.shard)
        position = int(self.position)
        facts = {
            "_count": keys.shape[0],
            "width of keys": keys.shape[1],
            "dtype of keys": short(keys.dtype),
            "position": position,
            "fill count": len(self),
            "size": self.size,
            "ids": self.has_ids,
        }
        everyones = checks.compare(OP, group, ranks, facts)
        if keys.shape[1] != dim:  # on every rank
            raise shape_error(OP, "keys", f"(B, {dim})", keys)
        counts = [theirs["_count"] for theirs in everyones]
        total = sum(counts)
        places = torch.arange(total)
        kept = places >= total - self.size  # of more keys than rows, the last
        places = (position + places).remainder(self.size)
        owner = torch.searchsorted(torch.tensor(self.bounds[1:]), places, right=True)
        by_rank = [each.split(counts) for each in (kept, owner)]
        sent_here = [int((k & (o == ranks.rank)).sum()) for k, o in zip(*by_rank, strict=True)]
        mine_kept, mine_owner = (each[ranks.rank] for each in by_rank)
        order = torch.where(mine_kept, mine_owner, ranks.world).argsort(stable=True)[: int(mine_kept.sum())]
        sent = torch.bincount(mine_owner[mine_kept], minlength=ranks.world).tolist()
        order = order.to(keys.device)
        rows = keys.detach().index_select(0, order)
        arrived = groups.all_to_all_rows(rows, sent_here, sent, ranks.name)
        if ids is not None:
            ids = groups.all_to_all_rows(ids.index_select(0, order), sent_here, sent, ranks.name)
        if arrived.shape[0]:
            # They follow each other in this rank's rows as in a ring of its own.
            begin = int(places[kept & (owner == ranks.rank)][0]) - self.first
            local, count = (torch.full_like(self.position, value) for value in (begin, 0))
            if ids is not None:
                at = torch.arange(begin, begin + ids.shape[0], device=ids.device).remainder(self.rows)
                self.shard_ids.index_copy_(0, at, ids)
            queue_push_(self.shard, arrived, local, count, normalize=self.normalize, backend=self.backend)
        self.position.fill_((position + total) % self.size)
        self.filled.fill_(min(len(self) + total, self.size))
        return self

    def _whole(self, rows):
        return groups.all_gather_rows(rows, self.sizes, self.group_name)

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        nn.Module._apply(self, fn, recurse)
        for name in ("position", "filled"):
            self._buffers[name] = after_apply(before[name], self._buffers[name])
        was_meta = self.shard.is_meta
        self.shard = fn(self.shard)
        if was_meta and not self.shard.is_meta:
            self.shard.zero_()
        if self.has_ids:
            self.shard_ids = after_apply(self.shard_ids, fn(self.shard_ids))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "storage"] = self._whole(self.shard)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.has_ids:
            destination[prefix + "ids"] = self.ids

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        names = ["storage", *self._buffers, *(["ids"] if self.has_ids else [])]
        absent = [prefix + name for name in names if prefix + name not in state_dict]
        shape = (self.size, self.shard.shape[1])
        storage = state_dict.get(prefix + "storage")
        if storage is not None and tuple(storage.shape) != shape:
            errors.append(
                f"size mismatch for {prefix}storage: the MoCoQueue of the checkpoint has (size, dim)"
                f" {tuple(storage.shape)}, this one {shape}"
            )
            return
        if strict and absent:
            missing.extend(absent)
            return
        own = slice(self.first, self.first + self.rows)
        parts = {prefix + "storage": self.shard}
        if self.has_ids:
            parts[prefix + "ids"] = self.shard_ids
        with torch.no_grad():
            for name, part in parts.items():
                if name in state_dict:
                    part.copy_(state_dict[name][own])
        others = {name: value for name, value in state_dict.items() if name not in parts}
        nn.Module._load_from_state_dict(
            self, others, prefix, local_metadata, strict, missing, unexpected, errors
        )

    def extra_repr(self):
        rows = f"rows {self.first} to {self.first + self.rows} on rank {self.rank} of {self.ranks.world}"
        dim, dtype = self.shard.shape[1], self.shard.dtype
        ids = ", ids=True" if self.has_ids else ""
        return f"size={self.size}, dim={dim}, dtype={dtype}, normalize={self.normalize}{ids}, {rows}"
