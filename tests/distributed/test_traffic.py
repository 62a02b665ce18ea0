"""The bytes that ranks send are those of the model on paper, and a ring's memory does not grow with the ranks."""

import pathlib

import pytest
import torch
from torch import distributed as dist

from benchmarks import distributed_model as model
from ssl_kernels import distributed
from ssl_kernels.distributed import groups
from tests.distributed import processes
from tests.helpers import random_rows

ROWS, DIM = 6, 8


class Counter:
    """Counts what this rank sends: of a collective, what its ring algorithm does."""

    def __init__(self, world):
        self.world, self.sent = world, 0
        self.send, self.collective = dist.batch_isend_irecv, groups._collective

    def __enter__(self):
        groups._collective = self.counted
        dist.batch_isend_irecv = self.counted_transfers
        return self

    def __exit__(self, *_):
        groups._collective, dist.batch_isend_irecv = self.collective, self.send

    def counted(self, name):
        shares = {
            "all_gather_into_tensor": self.world - 1,
            "reduce_scatter_tensor": (self.world - 1) / self.world,
            "all_to_all_single": 1,  # nothing to the rank itself
            "all_reduce": 2 * (self.world - 1) / self.world,
        }

        def run(x, *args):
            self.sent += round(x.numel() * x.element_size() * shares[name])
            return self.collective(name)(x, *args)

        return run

    def counted_transfers(self, transfers):
        self.sent += sum(t.tensor.numel() * t.tensor.element_size() for t in transfers if t.op is dist.isend)
        return self.send(transfers)

    def take(self):
        sent, self.sent = self.sent, 0
        return sent


def counted(rank, world, dtype):
    """{(loss, strategy): bytes sent (forward, backward)}."""
    x, y = (random_rows(ROWS, DIM, seed=seed + rank).to(dtype).requires_grad_() for seed in (0, 1))
    counts = [ROWS] * world
    found = {}
    for strategy in ("gather", "ring"):
        options = {"strategy": strategy, "check": False, "rows_per_rank": counts}
        for name, make in (
            ("nt_xent", lambda options=options: distributed.nt_xent_loss(x, y, **options)),
            ("clip", lambda options=options: distributed.clip_loss(x, y, 5.0, **options)),
            ("byol", lambda options=options: distributed.byol_loss(x, y, **options)),
        ):
            with Counter(world) as counter:
                loss = make()
                forward = counter.take()
                loss.backward()
                found[name, strategy] = (forward, counter.take())
    with Counter(world) as counter:
        distributed.moco_loss(x, y.detach(), strategy="ring", check=False, rows_per_rank=counts).backward()
        found["moco", "ring"] = (counter.take(), 0)
    return found


@pytest.mark.parametrize(
    "world, dtype", [(2, torch.float32), (3, torch.float64), (4, torch.bfloat16)], ids=str
)
def test_bytes_are_those_of_the_model(world, dtype):
    acc = 8 if dtype == torch.float64 else 4
    shape = (DIM, dtype.itemsize, acc)
    expected = {
        ("nt_xent", "gather"): model.gather(world, 2 * ROWS, *shape),
        ("clip", "gather"): model.gather(world, ROWS, *shape),
        ("nt_xent", "ring"): model.half_ring(world, 2 * ROWS, *shape),
        ("clip", "ring"): model.ring(world, ROWS, *shape),
    }
    for found in processes.run(world, counted, dtype):
        for name, load in expected.items():
            assert found[name] == (load.forward, load.backward), name
        assert found["byol", "gather"] == found["byol", "ring"] == (0, 0)
        # Frozen keys go round once; their expectation stays, and backward sends nothing.
        assert found["moco", "ring"] == ((world - 1) * ROWS * DIM * dtype.itemsize, 0)


def test_the_stored_table_is_what_the_model_writes():
    stored = pathlib.Path(__file__).resolve().parents[2] / "docs" / "distributed_model.md"
    assert stored.read_text() == model.table()


def peak(rank, world, rows, dim, strategy):
    """The most that a step on `rows` pairs allocates at once beyond inputs and gradients, in bytes."""
    x, y = (random_rows(rows, dim, seed=seed).requires_grad_() for seed in (0, 1))
    for tensor in (x, y):
        tensor.grad = torch.zeros_like(tensor)

    def step():
        distributed.nt_xent_loss(x, y, strategy=strategy, check=False).backward()

    step()
    with torch.profiler.profile(
        profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


@pytest.mark.slow  # up to 6 processes
def test_a_rings_memory_does_not_grow_with_the_ranks():
    rows = 1024
    peaks = {world: max(processes.run(world, peak, rows, 128, "ring")) for world in (1, 2, 4, 6)}
    assert max(peaks.values()) < 40e6 * 2 * rows / 4096
    assert max(peaks.values()) < 1.1 * min(peaks.values()), peaks
    assert peaks[6] < 1.01 * peaks[4], peaks
