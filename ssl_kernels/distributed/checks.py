"""What the ranks tell each other before rows move: how many each has, and whether all call the same."""

import hashlib
import json
import re
from contextlib import contextmanager

import torch

from ssl_kernels.checks import check_all_embeddings, check_same_rows
from ssl_kernels.distributed import groups

MESSAGE = 1024  # bytes per rank
_REFUSED = "refused"
_COMPILED_FOR = (
    "rows_per_rank must be what the ranks have, or equal numbers without it, in a compiled function"
)


def check_rows(op, **tensors):
    """As `check_embeddings`, but a rank may have no rows."""
    check_all_rows(op, tensors, tensors.values())


def check_all_rows(op, names, tensors, paired=0):
    """As `check_all_embeddings`, but a rank may have no rows."""
    stand_ins = []
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.dim() == 2 and not tensor.shape[0]:
            tensor = tensor.new_empty(1, tensor.shape[1])
        stand_ins.append(tensor)
    check_all_embeddings(op, names, stand_ins)
    if paired:
        check_same_rows(op, **dict(list(zip(names, tensors, strict=True))[:paired]))


def check_device_of_group(op, name, tensor, group):
    """`tensor` must lie where the group's backend can take it."""
    backend = str(groups.dist.get_backend(group))
    wanted = {"nccl": "cuda", "gloo": None}.get(backend)
    if wanted is not None and tensor.device.type != wanted:
        raise ValueError(
            f"{op}: {name} must be on {wanted}, where the backend {backend} of the group works, got {tensor.device}"
        )


def compare(op, group, ranks, facts):
    """Raise on every rank, naming ranks and values, where `facts` are not the same everywhere.

    Args:
        facts: From names to values that JSON knows. Those that begin with "_" may differ.

    Returns:
        The facts of all ranks in their order.

    Raises:
        ValueError: Ranks differ, or one of them said `refuse`.
    """
    everyones = _exchange({"function": op, **facts}, group, ranks)
    for rank, theirs in enumerate(everyones):
        if _REFUSED in theirs:
            raise ValueError(f"{op}: rank {rank} refused its input: {theirs[_REFUSED]}")
    for name in everyones[0]:
        if name.startswith("_"):
            continue
        values = [theirs.get(name) for theirs in everyones]
        if any(value != values[0] for value in values):
            raise ValueError(f"{op}: {name} must be the same on every rank, got {_by_rank(values)}")
    return everyones


@contextmanager
def refusing(op, group, ranks, tell=True):
    """Around the checks of this rank's input: where they raise, the ranks that are in `compare` are told."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if tell:
            words = str(error).encode("ascii", "replace").decode()[: MESSAGE // 4]
            _exchange({"function": op, _REFUSED: words}, group, ranks)
        raise


def _by_rank(values):
    """'float32 on rank 0, bfloat16 on ranks 1, 2'."""
    ranks = {}
    for rank, value in enumerate(values):
        ranks.setdefault(json.dumps(value).strip('"'), []).append(rank)
    return ", ".join(
        f"{value} on rank{'s' * (len(of) > 1)} {', '.join(map(str, of[:8]))}{' and others' * (len(of) > 8)}"
        for value, of in ranks.items()
    )


def _exchange(facts, group, ranks):
    text = json.dumps(facts).encode()
    if len(text) > MESSAGE:  # compared all the same, though not in words
        own = {name: value for name, value in facts.items() if name.startswith("_")}
        same = json.dumps({name: value for name, value in facts.items() if name not in own}).encode()
        short = {"function": facts["function"], "input": hashlib.sha256(same).hexdigest(), **own}
        text = json.dumps(short).encode()
    mine = torch.frombuffer(bytearray(text.ljust(MESSAGE)), dtype=torch.uint8).to(groups.device_of(group))
    everyones = groups.all_gather_rows(mine[None], [1] * ranks.world, ranks.name).cpu()
    return [json.loads(bytes(row.tolist()).decode()) for row in everyones]


def exchange_counts(counts, group, ranks):
    """The counts of all ranks, the only thing told where nothing is compared."""
    mine = torch.tensor([counts], device=groups.device_of(group))
    return groups.all_gather_rows(mine, [1] * ranks.world, ranks.name).tolist()


def assert_counts(op, expected, counts, like, ranks, rule=_COMPILED_FOR):
    """In a compiled function: raise where it runs if the ranks' counts are not the `expected` it was compiled for.

    expected: None: this rank's counts.
    """
    kind = {"dtype": torch.int64, "device": like.device}
    mine = torch.cat([torch.full((1, 1), count, **kind) for count in counts], 1)  # they may be symbolic
    everyones = groups.all_gather_rows(mine, [1] * ranks.world, ranks.name)
    wanted = mine if expected is None else torch.tensor(expected, **kind)
    torch._assert_async((everyones == wanted).all(), f"{op}: {rule}")


def as_fact(value):
    """An option as something to compare: numbers and strings themselves, of a tensor its kind."""
    if isinstance(value, torch.Tensor):
        return f"tensor, requires_grad={value.requires_grad and torch.is_grad_enabled()}"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return re.sub(r" at 0x\w+", "", str(value))
