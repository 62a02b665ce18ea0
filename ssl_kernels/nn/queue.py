"""The queue of MoCo: a ring of the last keys."""

from typing import Any, Self

import torch
from torch import nn

from ssl_kernels import backends
from ssl_kernels.checks import DTYPES, hold_values, is_whole
from ssl_kernels.losses._labels import as_ids
from ssl_kernels.nn.counters import Fill, after_apply
from ssl_kernels.ops.queue_push import queue_push_


class MoCoQueue(nn.Module):
    """A ring of the last `size` keys, negatives for `moco_loss`: `queue.push_(keys)` replaces the oldest.

        loss = moco_loss(query, key, queue)
        queue.push_(key)
        loss.backward()     # in this order or the other: the loss has what it needs, or raises

    Any size and any batch. Rows that no key was pushed to are never negatives. The keys, the position and the fill
    count are buffers: they are saved, loaded bit for bit and moved with the module; given memory by `to_empty` after
    the meta device, the queue is empty. On CUDA nothing waits for the device, and a push can be captured in a graph;
    once the host has learnt how many rows are filled, the loss is given these alone and no ids of rows to leave out.

    Args:
        size: K, how many keys it holds, >= 1.
        dim: D, their width, >= 1.
        dtype: In which they are held: float32, bfloat16 or float16; float64 for float64 queries. None is torch's
            default dtype.
        normalize: L2-normalise keys when they are pushed, as the loss expects them.
        ids: Whether an id is held with each key, in the buffer `ids`: `queue.push_(keys, ids)`. `moco_loss(...,
            ids=)` then leaves out the keys of a query's own id, as of earlier views of its sample.
        device: Where; None is the default device.
        backend: "native", "triton", "chunked" or "reference"; None picks.
        group: A process group (or DeviceMesh of one dimension) whose ranks divide the queue: each keeps K / W of the
            rows, in the order of one queue. Then `push_` takes the keys of its rank, which the others may have more or
            fewer of, the loss is `distributed.moco_loss`, and every rank calls `push_`, `keys`, `state_dict` and
            `load_state_dict`. A `state_dict` holds the whole queue: it loads with any number of ranks.

    Source: He et al., MoCo, arXiv:1911.05722.
    """

    def __new__(cls, *args, group=None, **options):
        if group is not None and cls is MoCoQueue:
            from ssl_kernels.distributed import queue  # which needs the modules of this package

            cls = queue.class_for(group)
        return super().__new__(cls)

    def __init__(
        self,
        size: int,
        dim: int,
        dtype: torch.dtype | None = None,
        *,
        normalize: bool = True,
        ids: bool = False,
        device: torch.device | str | int | None = None,
        backend: str | None = None,
        group: Any = None,
    ) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if not is_whole(value):
                raise TypeError(f"MoCoQueue: {name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"MoCoQueue: {name} must be at least 1, got {value}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise TypeError(f"MoCoQueue: dtype must be float64, float32, float16 or bfloat16, got {dtype}")
        backends.check_name("MoCoQueue", backend)
        self.normalize = normalize
        self.backend = backend
        self._fill = Fill()
        with torch.inference_mode(False):  # else it could be written under inference_mode alone
            self._make_storage(int(size), int(dim), group, dtype=dtype, device=device)
            self.register_buffer("position", torch.zeros((), dtype=torch.int64, device=device))
            self.register_buffer("filled", torch.zeros((), dtype=torch.int64, device=device))
            if ids:
                self._make_ids(int(size), device)

    @property
    def has_ids(self) -> bool:
        return "ids" in self._buffers

    def _make_storage(self, size, dim, group, **kind):
        self.register_buffer("storage", torch.zeros(size, dim, **kind))

    def _make_ids(self, size, device):
        self.register_buffer("ids", torch.zeros(size, dtype=torch.int64, device=device))

    def _check_whether_ids(self, ids):
        if self.has_ids != (ids is not None):
            rule = (
                "be given, since the queue holds ids"
                if self.has_ids
                else "be None, since the queue holds none"
            )
            raise ValueError(f"MoCoQueue.push_: ids must {rule}, got {'None' if ids is None else 'a value'}")

    def push_(self, keys: torch.Tensor, ids: torch.Tensor | None = None) -> Self:
        """Write `keys`, (B, D) of any floating dtype, over the oldest rows; with B > size only the last stay.

        ids: (B,) or (B, 1) integers or bool, if and only if the queue holds ids.

        Returns the queue. Raises TypeError or ValueError for what does not fit; nothing was written then.
        """
        self._check_whether_ids(ids)
        if not self.has_ids:
            self._push_keys_(keys)
            return self
        count = keys.shape[:1] if isinstance(keys, torch.Tensor) else ()
        ids = as_ids("MoCoQueue.push_", "ids", ids, count, self.storage)
        size = self.ids.shape[0]
        begin = max(ids.shape[0] - size, 0)
        places = torch.arange(begin, ids.shape[0], device=self.ids.device)
        places = (places + self.position).remainder(size)
        self._push_keys_(keys)
        self.ids.index_copy_(0, places, ids[begin:])
        return self

    def _push_keys_(self, keys):
        watched = self._is_watched()
        followed = watched and self._fill.follows(self.filled)
        queue_push_(
            self.storage, keys, self.position, self.filled, normalize=self.normalize, backend=self.backend
        )
        if watched:
            self._fill.pushed(self.filled, self.storage.shape[0], keys.shape[0], followed)

    def _is_watched(self):
        """Whether the fill count lies on a CUDA device, so that reading it would wait."""
        return self.filled.is_cuda and hold_values(self.filled)

    def _filled_rows(self):
        """How many rows are filled, where the host knows it and they are some; None otherwise."""
        if self._is_watched():
            return self._fill.known(self.filled, self.storage.shape[0]) or None
        if self.storage.device.type == "cpu" and not torch.compiler.is_compiling():
            return len(self) or None
        return None

    def _first(self, rows, count):
        return rows if count == rows.shape[0] else rows[:count]

    @property
    def keys(self) -> torch.Tensor:
        """The filled rows, (len(queue), D), a view in the order of storage. On CUDA it waits for the device."""
        return self.storage[: len(self)]

    def __len__(self):
        """How many rows hold keys. On CUDA it waits for the device."""
        return int(self.filled)

    def __bool__(self):
        """True, empty or not: `queue or default` is the queue."""
        return True

    def negatives(self, queries: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """What `contrastive` takes for this many queries: (columns, row_ids, column_ids).

        The columns are the filled rows alone, without ids, where the host knows how many these are. Else, as in a
        compilation or a graph capture, ids are equal where a row is not filled.
        """
        if (filled := self._filled_rows()) is not None:
            return self._first(self.storage, filled), None, None
        rows = torch.arange(len(self.storage), device=self.storage.device)
        zeros = torch.zeros(queries, dtype=torch.int64, device=self.storage.device)
        return self.storage, zeros, (rows < self.filled).long()

    def negatives_with_ids(
        self, ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What `contrastive` takes for queries of these ids: (columns, row_ids, column_ids, column_bias or None)."""
        if not self.has_ids:
            raise ValueError("MoCoQueue: ids must be True for a loss with ids, got a queue that holds none")
        if (filled := self._filled_rows()) is not None:
            return self._first(self.storage, filled), ids, self._first(self.ids, filled), None
        rows = torch.arange(self.storage.shape[0], device=self.storage.device)
        bias = torch.zeros_like(rows, dtype=torch.float64).masked_fill(rows >= self.filled, -torch.inf)
        return self.storage, ids, self.ids, bias

    def _apply(self, fn, recurse=True):
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name in self._buffers.keys() - {"storage"}:
            self._buffers[name] = after_apply(before[name], self._buffers[name])
        if before["storage"].is_meta and not self.storage.is_meta:
            self.storage.zero_()
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        # What is refused leaves the queue as it is: the position in another one means nothing here.
        absent = [prefix + name for name in self._buffers if prefix + name not in state_dict]
        storage = state_dict.get(prefix + "storage", self.storage)
        if storage.shape != self.storage.shape:
            errors.append(
                f"size mismatch for {prefix}storage: the MoCoQueue of the checkpoint has (size, dim)"
                f" {tuple(storage.shape)}, this one {tuple(self.storage.shape)}"
            )
        elif strict and absent:
            missing.extend(absent)
        else:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing, unexpected, errors
            )

    def extra_repr(self) -> str:
        size, dim = self.storage.shape
        ids = ", ids=True" if self.has_ids else ""
        return f"size={size}, dim={dim}, dtype={self.storage.dtype}, normalize={self.normalize}{ids}"
