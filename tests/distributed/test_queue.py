"""A queue that ranks divide is the queue of one; rows that change ranks come back."""

import copy

import pytest
import torch
from torch import distributed as dist
from torch import nn

import ssl_kernels
from ssl_kernels import distributed
from ssl_kernels.nn import MoCoQueue
from tests.distributed import processes
from tests.helpers import random_rows, same_bits

SIZE, DIM = 7, 4
PUSHES = ((2, 1, 0), (3, 0, 1), (1, 4, 4), (0, 0, 0), (6, 5, 0), (1, 1, 1))


def keys_of(step):
    return random_rows(sum(PUSHES[step]), DIM, seed=step + 10)


class WithQueue(nn.Module):
    def __init__(self, queue):
        super().__init__()
        self.encoder, self.queue = nn.Linear(DIM, DIM), queue

    def forward(self, x):
        return self.encoder(x)


def divided(rank, world, state):
    queue = MoCoQueue(SIZE, DIM, ids=True, group=dist.group.WORLD)
    whole = MoCoQueue(SIZE, DIM, ids=True)
    if state is not None:
        queue.load_state_dict(state)
        whole.load_state_dict(state)
    parallel = nn.parallel.DistributedDataParallel(WithQueue(queue))
    assert queue.shard.shape[0] in (SIZE // world, SIZE // world + 1)
    for step, counts in enumerate(PUSHES):
        counts = (*counts[: world - 1], sum(counts[world - 1 :]))
        start = sum(counts[:rank])
        keys = keys_of(step)
        own = slice(start, start + counts[rank])
        key_ids, query_ids = torch.arange(len(keys)) % 3, torch.arange(6) % 4

        query, key = (random_rows(6, DIM, seed=seed).double().float() for seed in (step, step + 1))
        mine = slice(*((0, 4) if rank == 0 else (4, 6) if rank == 1 else (6, 6)))
        temperature = torch.tensor(0.2, requires_grad=True)
        plain_query = query.clone().requires_grad_()
        for strategy, ids in (("gather", None), ("ring", None), ("gather", query_ids), ("ring", query_ids)):
            expected = ssl_kernels.moco_loss(plain_query, key, whole, temperature, ids=ids)
            wanted = torch.autograd.grad(expected, (plain_query, temperature))
            rows = query[mine].clone().requires_grad_()
            own_ids = None if ids is None else ids[mine]
            loss = distributed.moco_loss(rows, key[mine], queue, temperature, ids=own_ids, strategy=strategy)
            found = torch.autograd.grad(loss, (rows, temperature))
            total = torch.stack((loss.detach(), found[1]))
            dist.all_reduce(total)
            torch.testing.assert_close(total[0] / world, expected.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(total[1] / world, wanted[1], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found[0] / world, wanted[0][mine], rtol=1e-4, atol=1e-6)

        queue.push_(keys[own], key_ids[own])
        whole.push_(keys, key_ids)
        assert same_bits(queue.keys, whole.keys), f"step {step}"
        assert same_bits(queue.ids, whole.ids), f"step {step}"
        assert (len(queue), int(queue.position)) == (len(whole), int(whole.position))
        parallel(keys)  # sends the buffers of rank 0 to the others
        assert same_bits(queue.keys, whole.keys)
    state = copy.deepcopy(queue).state_dict()
    assert all(same_bits(state[name], value) for name, value in whole.state_dict().items())
    return {name: value.numpy() for name, value in state.items()}


def test_a_divided_queue_is_the_queue_of_one_process_and_loads_with_other_numbers_of_ranks():
    of_three = processes.run(3, divided, None)
    state = {name: torch.from_numpy(value) for name, value in of_three[0].items()}
    plain = MoCoQueue(SIZE, DIM, ids=True)
    plain.load_state_dict(state)
    assert len(plain) == SIZE
    processes.run(2, divided, state)


def refused(rank, world):
    queue = MoCoQueue(SIZE, DIM, ids=True, group=dist.group.WORLD)
    queue.push_(random_rows(2, DIM), torch.arange(2))
    x = random_rows(2, DIM)
    before = queue.shard.clone()
    others = dist.new_group([0, 1])
    messages = []
    for attempt in (
        lambda: queue.push_(random_rows(2, DIM + rank), torch.arange(2)),
        lambda: queue.push_(x.to((torch.float32, torch.bfloat16)[rank]), torch.arange(2)),
        lambda: queue.push_(x, None if rank else torch.arange(2)),
        lambda: ssl_kernels.moco_loss(x, x, queue),
        lambda: MoCoQueue(1, DIM, group=dist.group.WORLD),
        lambda: queue.load_state_dict(MoCoQueue(SIZE + 1, DIM, ids=True).state_dict()),
        lambda: distributed.unshuffle_rows(x, distributed.shuffle_rows(x[:1], 0)[1]),
        lambda: distributed.shuffle_rows(x, seed=rank),
        lambda: distributed.moco_loss(x, x, queue, group=others),
    ):
        with pytest.raises((ValueError, RuntimeError)) as raised:
            attempt()
        messages.append(str(raised.value))
    assert same_bits(queue.shard, before)
    assert len(queue) == 4
    return messages


def test_what_does_not_fit_is_refused_on_every_rank():
    for rank, messages in enumerate(processes.run(2, refused)):
        assert (
            messages[0]
            == "MoCoQueue: width of keys must be the same on every rank, got 4 on rank 0, 5 on rank 1"
        )
        assert "dtype of keys must be the same on every rank" in messages[1]
        own = "MoCoQueue.push_: ids must be given, since the queue holds ids, got None"
        assert messages[2] == (own if rank else f"MoCoQueue: rank 1 refused its input: {own}")
        assert messages[3].startswith(
            "MoCoQueue: a queue with a group must be given to ssl_kernels.distributed"
        )
        assert messages[4] == "MoCoQueue: size must be at least the 2 ranks of group, got 1"
        assert "the MoCoQueue of the checkpoint has (size, dim) (8, 4), this one (7, 4)" in messages[5]
        assert messages[6] == "unshuffle_rows: x must have 1 rows, got 2"
        assert (
            messages[7] == "shuffle_rows: seed must be the same on every rank, got 0 on rank 0, 1 on rank 1"
        )
        assert messages[8] == "moco_loss: group must be the one that divides the queue, got another"


def shuffled(rank, world):
    sizes = (4, 0, 3)
    start = sum(sizes[:rank])
    everyones = torch.arange(7 * 6, dtype=torch.float64).view(7, 2, 3)
    x = everyones[start : start + sizes[rank]].clone().requires_grad_()
    seen = []
    for seed in (0, 1, None, None):
        for check in (True, False):
            rows, shuffle = distributed.shuffle_rows(x, seed, check=check)
            if seed is not None:
                order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
                assert same_bits(rows.detach(), everyones[order[start : start + sizes[rank]]])
            keys = distributed.unshuffle_rows(rows.flatten(1) * 2, shuffle)
            assert same_bits(keys.detach(), x.detach().flatten(1) * 2)
            (gradient,) = torch.autograd.grad((keys * x.detach().flatten(1)).sum(), x)
            assert same_bits(gradient, 2 * x.detach())
            seen.append(rows.detach()[:, 0, 0].tolist())
    return seen


def test_shuffled_rows_change_ranks_and_come_back():
    found = processes.run(3, shuffled)
    for step in range(8):
        assert sorted(value for of_rank in found for value in of_rank[step]) == [
            6.0 * row for row in range(7)
        ]
        assert [len(of_rank[step]) for of_rank in found] == [4, 0, 3]
    assert found[0][0] == found[0][1] != found[0][2]  # one order a seed
    assert found[0][4] != found[0][6]  # without a seed, a new one every time
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0)).tolist()
    assert [value / 6 for of_rank in found for value in of_rank[0]] == order
