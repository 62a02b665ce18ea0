"""Mistakes in every collective and transfer, each of which the checks of some losses must notice."""

import importlib
import inspect
import time
from typing import NamedTuple

import torch

from ssl_kernels.distributed import groups
from tests import sites

GROUPS, TRANSPORT, PAIRS, CALL = "groups", "transport", "pairs", "call"
CHECKS, KEYS, OVER = "checks", "gather_rows", "over_ranks"
SUMS, HARDEST, MARKED, QUEUE, SHUFFLE, LOSSES = (
    "class_sums",
    "hardest",
    "marked_mean",
    "queue",
    "shuffle",
    "losses",
)
# In the order in which they import each other.
MODULES = (
    GROUPS,
    TRANSPORT,
    "operators",
    "once",
    PAIRS,
    SUMS,
    HARDEST,
    MARKED,
    CHECKS,
    KEYS,
    CALL,
    QUEUE,
    SHUFFLE,
    OVER,
    "positive_logits",
    LOSSES,
    "moco",
    "labelled",
)


class Mutation(NamedTuple):
    """In one module, `old` becomes `new`, where `tests.sites` finds it."""

    name: str
    module: str
    old: str
    new: str
    at: str = ""


MUTATIONS = [
    Mutation(
        "wait: collectives", GROUPS, "return torch.ops._c10d_functional.wait_tensor(tensor)", "return tensor"
    ),
    Mutation("wait: transfers", TRANSPORT, "            work.wait()", "            pass"),
    Mutation("scale: mean", CALL, "(world / (views * self.total))", "(1 / (views * self.total))"),
    Mutation(
        "scale: rows of this rank", CALL, "self.total = sum(self.sizes)", "self.total = self.sizes[0] * world"
    ),
    Mutation("scale: weighted mean", CALL, "(world * loss.sum() / total", "(loss.sum() / total"),
    Mutation(
        "scale: sum of weights of this rank alone",
        CALL,
        "groups.all_reduce(weights.sum(), self.ranks.name)",
        "weights.sum()",
    ),
    Mutation(
        "wait: rows of others", GROUPS, "most, world = _wait(started), max", "most, world = started, max"
    ),
    Mutation("wait: what is exchanged", GROUPS, "return _wait(started)", "return started"),
    Mutation("wait: all-to-all", GROUPS, "return _wait(start_all_to_all(", "return (start_all_to_all("),
    Mutation(
        "wait: all-reduce",
        GROUPS,
        'return _wait(_collective("all_reduce")(',
        'return (_collective("all_reduce")(',
    ),
    Mutation("wait: greatest log-sum-exp", GROUPS, "top = _wait(reduce(", "top = (reduce("),
    Mutation("wait: sum of exponentials", GROUPS, "shift + _wait(reduce(", "shift + (reduce("),
    Mutation(
        "max: greatest log-sum-exp",
        GROUPS,
        '(lse.contiguous(), "max", name)',
        '(lse.contiguous(), "min", name)',
    ),
    Mutation("sum: exponentials", GROUPS, '.exp(), "sum", name)', '.exp(), "max", name)'),
    Mutation(
        "offset: order of an even gather",
        GROUPS,
        "spans = [(rank + 1, world), (0, rank)]",
        "spans = [(0, rank), (rank + 1, world)]",
    ),
    Mutation(
        "offset: order of an uneven gather",
        GROUPS,
        "(rank + k) % world for k in range(1, world)",
        "k for k in range(world) if k != rank",
    ),
    Mutation(
        "offset: rank of delivered parts",
        TRANSPORT,
        "behind = sum(self.sizes[self.ranks.rank + 1 :])",
        "behind = 0",
    ),
    Mutation(
        "offset: own rows of a gather at once",
        TRANSPORT,
        "part.tensor_split((sizes[rank],))",
        "part.tensor_split((sizes[0],))",
    ),
    Mutation(
        "own: found by this rank",
        TRANSPORT,
        "ours.add_(part) for ours, part in zip",
        "part for ours, part in zip",
    ),
    Mutation("own: log-sum-exps of this rank", TRANSPORT, "torch.cat((ours[None], part))", "part"),
    Mutation("own: what its visit kept", PAIRS, "kept[first].extend", "kept[not first].extend"),
    Mutation("half: of a block of a ring", TRANSPORT, "slice(half, None)", "slice(half + 1, None)"),
    Mutation("rows: their gradient by this rank", KEYS, "[own.clone()]", "[own * 0]"),
    Mutation("rows: which are this rank's", KEYS, "start = sum(sizes[:rank])", "start = 0"),
    Mutation("rows: of the others", KEYS, "torch.cat((before, behind))", "torch.cat((behind, before))"),
    Mutation(
        "sum: reduce-scatter",
        GROUPS,
        '(x.contiguous(), "sum", world, name)',
        '(x.contiguous(), "max", world, name)',
    ),
    Mutation("sum: what an all-to-all brings", TRANSPORT, "sizes, rank).sum(0)", "sizes, rank).amax(0)"),
    Mutation("sum: all-reduce", GROUPS, '(x.contiguous(), "sum", name)', '(x.contiguous(), "max", name)'),
    Mutation(
        "backward: all-reduce", GROUPS, "return _AllReduce.apply(grad, ctx.name), None", "return grad, None"
    ),
    Mutation("merge: sums", TRANSPORT, "            ours += theirs", "            ours.copy_(theirs)"),
    Mutation(
        "merge: log-sum-exps",
        TRANSPORT,
        "merged = torch.logaddexp(total[0], part[0])",
        "merged = part[0].clone()",
    ),
    Mutation(
        "merge: log-sum-exps of ranks", TRANSPORT, "lse = torch.logsumexp(lses, 0)", "lse = lses.amax(0)"
    ),
    Mutation(
        "rank: neighbours",
        TRANSPORT,
        "left, right = (rank - 1) % world, (rank + 1) % world",
        "left, right = (rank + 1) % world, (rank - 1) % world",
    ),
    Mutation(
        "rank: owner of a block", TRANSPORT, "owner = (rank + step) % world", "owner = (rank - step) % world"
    ),
    Mutation("offset: own rows of a reduce-scatter", TRANSPORT, "before = sum(sizes[:rank])", "before = 0"),
    Mutation("rank: home", TRANSPORT, "(rank + last) % world, (rank - last) % world", "left, right"),
    Mutation(
        "step: how far a half ring goes",
        TRANSPORT,
        "last = world // 2 if symmetric",
        "last = (world - 1) // 2 if symmetric",
    ),
    Mutation(
        "half: whose rows",
        TRANSPORT,
        "return slice(own // 2, own), EVERY",
        "return slice(0, own // 2), EVERY",
    ),
    Mutation(
        "half: blocks of a gather", TRANSPORT, "whole = ends[(world - 1) // 2]", "whole = ends[world // 2]"
    ),
    Mutation("found: of own rows, forward", PAIRS, "lse = torch.logaddexp(lse, found[0])", "lse = lse + 0"),
    Mutation("found: of own rows, backward", PAIRS, "grad_rows.add_(found[0])", "grad_rows"),
    Mutation(
        "found: scale of the last block alone",
        PAIRS,
        "grad_scale = grad_scale + part_scale",
        "grad_scale = part_scale",
    ),
    Mutation(
        "travels: gradient of log-sum-exps", PAIRS, "travelling = (lse, grad_lse)", "travelling = (lse, lse)"
    ),
    Mutation(
        "travels: log-sum-exps of columns",
        PAIRS,
        "travelling = (column_lse, _or_zeros",
        "travelling = (column_lse * 0, _or_zeros",
    ),
    Mutation(
        "pairs: positives of another's block", PAIRS, "return 0 if first else columns.shape[0]", "return 0"
    ),
    Mutation("classes: of this rank alone", SUMS, "sums = groups.all_reduce(sums, name)", "sums = sums + 0"),
    Mutation(
        "classes: a slab too few",
        SUMS,
        "for first in range(0, count, at_once)",
        "for first in range(0, max(1, count - at_once), at_once)",
    ),
    Mutation(
        "hardest: where rows lie", HARDEST, "at = (index - theirs[0]) % everyones", "at = index % everyones"
    ),
    Mutation("marked: numbers of a rank's rows", MARKED, "start = sum(sizes[: setting.rank])", "start = 0"),
    Mutation(
        "marked: columns of the global batch", MARKED, ".index_select(1, theirs)", "[:, : theirs.shape[0]]"
    ),
    Mutation(
        "marked: bits of this rank", MARKED, "[own] if marks", "[own] if True or marks", at="def forward"
    ),
    Mutation("queue: where rows lie", QUEUE, "[0]) - self.first", "[0]) - 0"),
    Mutation(
        "queue: who keeps them",
        QUEUE,
        "torch.tensor(self.bounds[1:]), places, right=True",
        "torch.tensor(self.bounds[1:]), places",
    ),
    Mutation(
        "queue: position", QUEUE, "(position + total) % self.size", "(position + keys.shape[0]) % self.size"
    ),
    Mutation(
        "shuffle: order of departure",
        SHUFFLE,
        "self.departure = place[own].argsort()",
        "self.departure = place[own].argsort(descending=True)",
    ),
    Mutation("shuffle: way back", SHUFFLE, "if back:", "if False:"),
    Mutation(
        "shuffle: order of arrival",
        SHUFFLE,
        "self.arrival = source.argsort(stable=True)",
        "self.arrival = torch.arange(len(source))",
    ),
    Mutation("ids: order on the way", QUEUE, "ids.index_select(0, order)", "ids[: len(order)]"),
    Mutation(
        "ids: where rows lie",
        QUEUE,
        "torch.arange(begin, begin + ids.shape[0]",
        "torch.arange(0, ids.shape[0]",
    ),
    Mutation("ids: of travelling rows", PAIRS, "(block[1], column_ids)", "(block[1], column_ids * 0)"),
    Mutation("ids: of another's block", PAIRS, "row_ids[part], block[1]", "row_ids[part], block[1] * 0"),
    Mutation(
        "ids: pairs of another's block", PAIRS, '"own": first and ids is not None', '"own": ids is not None'
    ),
    Mutation(
        "sizes: all-to-all", GROUPS, "list(received), list(sent), name", "list(sent), list(received), name"
    ),
    Mutation(
        "sizes: keys of this rank",
        KEYS,
        "groups.all_gather_rows(rows, sizes,",
        "groups.all_gather_rows(rows, [rows.shape[0]] * len(sizes),",
    ),
    Mutation(
        "sizes: of a compiled function",
        CHECKS,
        "(everyones == wanted).all()",
        "(everyones == everyones).all()",
    ),
    Mutation(
        "ring of one: keeps as much as the plain loss",
        OVER,
        "with kept_at_most(_bytes_of_blocks(*args, *options.values())):",
        "with kept_at_most(1 << 40):",
    ),
]


def apply(mutation):
    """Make the modules again of their sources, one of which has the mistake. The process is lost for anything else."""
    for name in MODULES:
        module = importlib.import_module(f"ssl_kernels.distributed.{name}")
        source = inspect.getsource(module)
        if mutation is not None and name == mutation.module:
            source = sites.replaced(source, mutation.old, mutation.new, mutation.at)
        exec(compile(source, module.__file__, "exec"), module.__dict__)
    package = importlib.import_module("ssl_kernels.distributed")
    for module in (LOSSES, "moco", "labelled", SHUFFLE, KEYS):
        for name, value in vars(importlib.import_module(f"ssl_kernels.distributed.{module}")).items():
            if name in package.__all__:
                setattr(package, name, value)


def slow_down(rank):
    """Rank 1 comes late to every transfer, and memory that nothing has arrived in is NaN."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if rank == 1:
        started, sent = groups._collective, groups.dist.batch_isend_irecv

        def late(function):
            def run(*args):
                time.sleep(0.02)
                return function(*args)

            return run

        groups._collective = late(started)
        groups.dist.batch_isend_irecv = late(sent)
