"""A call of a loss over a process group: what its rank knows of the others, and what the loss divides by."""

from collections.abc import Sequence

import torch

from ssl_kernels.backends import choose_backend
from ssl_kernels.checks import check_choice, check_reduction, is_whole, short
from ssl_kernels.distributed import checks, groups
from ssl_kernels.distributed.pairs import Setting
from ssl_kernels.distributed.transport import TRANSPORTS
from ssl_kernels.ops.library import accumulation_dtype

# `strategy=None` gathers while the rows of all ranks and their gradients take no more than this on a rank.
GATHERED_BYTES = 256 << 20


def _check_rows_per_rank(op, counts, world):
    if counts is None:
        return
    if not isinstance(counts, Sequence) or not all(map(is_whole, counts)):
        raise TypeError(f"{op}: rows_per_rank must be a sequence of whole numbers or None, got {counts!r}")
    if len(counts) != world or min(counts) < 0:
        raise ValueError(
            f"{op}: rows_per_rank must hold the numbers of rows of {world} ranks, each at least 0, got {list(counts)}"
        )


class Call:
    """One call of the loss `op` on one rank of `group`."""

    def __init__(self, op, *, group, strategy, check, rows_per_rank):
        self.op, self.strategy, self.check, self.rows_per_rank = op, strategy, check, rows_per_rank
        self.group, self.ranks = groups.ranks_of(op, group)
        with self.checking():
            check_choice(op, "strategy", strategy, *TRANSPORTS, None)
            _check_rows_per_rank(op, rows_per_rank, self.ranks.world)
        self.sizes = None

    @property
    def alone(self):
        return self.ranks.world == 1

    def checking(self):
        """Around the checks of this rank's input: where they raise, the other ranks are told."""
        tell = self.check and not torch.compiler.is_compiling()
        return checks.refusing(self.op, self.group, self.ranks, tell)

    def meet(self, rows, tensors, backend, operation="contrastive", extra=(), **options):
        """Learn how many rows the ranks have, and with `check` whether they agree.

        Args:
            rows: The tensor whose rows are counted.
            tensors: By name, all that may get a gradient.
            extra: Further counts to exchange.
            options: What else has to be the same on every rank.

        Returns:
            For each of `extra` the counts of all ranks.
        """
        counts = [rows.shape[0], *extra]
        with self.checking():
            self.like, self.backend = rows, self._backend(rows, backend, operation)
        world = self.ranks.world
        if torch.compiler.is_compiling():
            known = self.rows_per_rank
            everyones = [[count, *extra] for count in known or counts[:1] * world]
            if self.check:
                checks.assert_counts(self.op, everyones if known else None, counts, rows, self.ranks)
        elif self.check:
            known = self.rows_per_rank and [int(count) for count in self.rows_per_rank]
            facts = {"_counts": counts, "strategy": self.strategy, "rows_per_rank": known}
            for name, tensor in tensors.items():
                if isinstance(tensor, torch.Tensor):
                    facts[f"width of {name}"] = list(tensor.shape[1:])
                    facts[f"dtype of {name}"] = short(tensor.dtype)
                    facts[f"requires_grad of {name}"] = tensor.requires_grad and torch.is_grad_enabled()
                else:
                    facts[name] = checks.as_fact(tensor)
            facts |= {name: checks.as_fact(value) for name, value in options.items()}
            everyones = [
                theirs["_counts"] for theirs in checks.compare(self.op, self.group, self.ranks, facts)
            ]
        elif self.rows_per_rank is not None and not extra:
            everyones = [[count] for count in self.rows_per_rank]
        else:
            everyones = checks.exchange_counts(counts, self.group, self.ranks)
        self.sizes, *others = (tuple(of_ranks) for of_ranks in zip(*everyones, strict=True))
        if self.rows_per_rank is not None and tuple(self.rows_per_rank) != self.sizes:
            raise ValueError(
                f"{self.op}: rows_per_rank must be what the ranks have, {list(self.sizes)},"
                f" got {list(self.rows_per_rank)}"
            )
        if self.sizes[self.ranks.rank] != counts[0]:
            raise ValueError(
                f"{self.op}: rows_per_rank must hold the numbers of rows of {world} ranks, {counts[0]} for this one,"
                f" got {list(self.sizes)}"
            )
        self.total = sum(self.sizes)
        if not self.total:
            raise ValueError(f"{self.op}: at least one rank must have rows, got none on any")
        return others

    def _backend(self, rows, backend, operation):
        stand_in = rows if rows.shape[0] else rows.new_empty(1, rows.shape[1])
        chosen = choose_backend(operation, backend, self.op, stand_in, stand_in)
        if chosen == "reference":
            if backend is not None:
                raise ValueError(
                    f'{self.op}: backend must be "native", "triton" or "chunked" over several ranks, got "reference"'
                )
            chosen = "chunked"
        return chosen

    def setting(self, normalize, rows=None):
        """The `Setting` of this call for rows that travel."""
        rows = self.like if rows is None else rows
        strategy = self.strategy
        if strategy is None:
            wide = accumulation_dtype(rows).itemsize
            gathered = self.total * rows.shape[1] * (rows.dtype.itemsize + wide)
            strategy = "gather" if gathered <= GATHERED_BYTES else "ring"
        return Setting(
            self.backend, bool(normalize), strategy, self.ranks.rank, self.ranks.world, self.ranks.name
        )

    def rows_of(self, views):
        """How many rows the ranks have of a tensor with `views` rows a counted row."""
        return tuple(views * count for count in self.sizes)

    def check_common(self, reduction, row_weights, rows, like):
        check_reduction(self.op, reduction, row_weights, rows, like)
        checks.check_device_of_group(self.op, "the input", like, self.group)

    def reduce(self, loss, reduction, views=1, row_weights=None, counted=None):
        """Rows' losses, float64, to this rank's result: the mean over the ranks is the global batch's loss.

        counted: Where given, (n,) of 0 and 1: the rows that the mean is over.
        """
        acc, world = accumulation_dtype(self.like), self.ranks.world
        if row_weights is not None:
            row_weights = row_weights.to(loss.dtype)
            loss = loss * row_weights
        if reduction == "none":
            return loss.to(acc)
        if reduction == "sum":
            return (world * loss.sum()).to(acc)
        if row_weights is None and counted is None:
            return (loss.sum() * (world / (views * self.total))).to(acc)
        weights = counted.to(loss.dtype) if row_weights is None else row_weights
        if row_weights is not None and counted is not None:
            weights = weights * counted
        total = groups.all_reduce(weights.sum(), self.ranks.name)
        counts = total != 0
        return (world * loss.sum() / total.where(counts, 1)).where(counts, 0).to(acc)
