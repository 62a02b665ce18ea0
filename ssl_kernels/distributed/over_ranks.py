"""What makes a loss of a `Call` a public function of the package."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ssl_kernels import losses
from ssl_kernels.distributed.call import Call
from ssl_kernels.memory import kept_at_most

_DOC = """

    Over a process group: each rank passes its own rows, any number of them, and gets a loss whose mean over the ranks
    is that of the rows of all ranks together. Where gradients are averaged over the ranks, as DistributedDataParallel
    and fully_shard do, every parameter gets the gradient of that mean. docs/distributed.md has the contract.

    Args:
        group: A process group or a DeviceMesh of one dimension; None is the default group. With one rank in it, this is
            `ssl_kernels.{name}`, whose other arguments it takes and documents; "reference" is no backend here.
        strategy: "gather" moves the rows of all ranks to every rank at once, "ring" a block at a time while the one
            before is computed, in memory that does not grow with the number of ranks. None gathers while the gathered
            rows and their gradients take at most 256 MB per rank.
        check: Compare widths, dtypes, flags and options of all ranks before rows move, and raise on every rank where
            they differ. Without it the ranks tell each other only how many rows they have.
        rows_per_rank: The number of rows of each rank, where it is known: with check=False nothing is exchanged before.

    Raises:
        RuntimeError: torch.distributed is not initialised; a rank is gone, once the group's timeout is over.
        TypeError, ValueError: As `ssl_kernels.{name}`, and where ranks differ.
    """


def _bytes_of_blocks(*arguments: Any) -> int:
    """What a ring over several ranks holds more than the plain function: eight blocks, of rows, gradients and sums."""
    rows = [each for each in arguments if isinstance(each, torch.Tensor) and each.dim() == 2]
    return sum(8 * each.numel() * each.element_size() for each in rows)


def over_ranks(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`function`, which takes a `Call` first, as a public loss: the plain one where the group has one rank."""
    name = function.__name__
    plain = getattr(losses, name)

    @functools.wraps(plain, assigned=("__module__", "__name__", "__qualname__"))
    def run(
        *args: Any,
        group: Any = None,
        strategy: str | None = None,
        check: bool = True,
        rows_per_rank: Sequence[int] | None = None,
        **options: Any,
    ) -> torch.Tensor:
        call = Call(name, group=group, strategy=strategy, check=check, rows_per_rank=rows_per_rank)
        if call.alone:
            if strategy == "ring" and not torch.compiler.is_compiling():
                with kept_at_most(_bytes_of_blocks(*args, *options.values())):
                    return plain(*args, **options)
            return plain(*args, **options)
        return function(call, *args, **options)

    run.__doc__ = plain.__doc__.split("\n", 1)[0] + _DOC.format(name=name)
    run.operation = plain.operation
    del run.__wrapped__
    return run
