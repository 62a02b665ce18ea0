"""`distributed.gather_keys` with two processes over gloo."""

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing

from ssl_kernels.distributed import gather_keys
from ssl_kernels.nn import MoCoQueue
from tests.helpers import random_rows, same_bits

WORLD = 2


def message_of(function, *arguments):
    """What it raises, as a ValueError."""
    try:
        function(*arguments)
    except ValueError as error:
        return str(error)
    return None


def work(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    everyones = [random_rows(3, 4, seed=seed) for seed in range(WORLD)]

    queue = MoCoQueue(8, 4)
    for _ in range(2):  # wraps
        gathered = gather_keys(everyones[rank].T.contiguous().T.requires_grad_(), queue)
        assert same_bits(gathered, torch.cat(everyones))
        assert not gathered.requires_grad
        queue.push_(gathered)
    states = [torch.empty_like(queue.storage) for _ in range(WORLD)]
    dist.all_gather(states, queue.storage)
    assert same_bits(*states)
    assert gather_keys(torch.empty(0, 4), queue).shape == (0, 4)

    uneven = MoCoQueue(8, 4).push_(random_rows(2 + rank, 4))
    message = message_of(gather_keys, everyones[rank], uneven)
    assert message == (
        "gather_keys: queue position must be the same on every rank, got 2 on rank 0, 3 on rank 1"
    )
    full = MoCoQueue(3, 4).push_(random_rows(3 - 3 * rank, 4))  # position 0 on both
    message = message_of(gather_keys, everyones[rank], full)
    assert message == (
        "gather_keys: queue fill count must be the same on every rank, got 3 on rank 0, 0 on rank 1"
    )
    for check in (True, False):  # ranks may differ in their number of keys
        gathered = gather_keys(everyones[rank][rank:], check=check)
        assert same_bits(gathered, torch.cat([rows[r:] for r, rows in enumerate(everyones)]))
    message = message_of(gather_keys, everyones[rank] if rank else everyones[rank][0])
    own = "gather_keys: keys must have shape (B, D), got (4,)"
    assert message == (f"gather_keys: rank 0 refused its input: {own}" if rank else own)
    message = message_of(gather_keys, everyones[rank].to((torch.float32, torch.bfloat16)[rank]))
    assert message == (
        "gather_keys: dtype of keys must be the same on every rank, got float32 on rank 0, bfloat16 on rank 1"
    )
    assert same_bits(gather_keys(everyones[rank]), torch.cat(everyones))  # the group still works
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    multiprocessing.spawn(work, (str(tmp_path / "rendezvous"),), nprocs=WORLD)


def test_without_a_process_group_it_says_so():
    with pytest.raises(RuntimeError, match=r"^gather_keys: torch.distributed must be initialised"):
        gather_keys(random_rows(2, 3))
