import argparse

import pytest
import torch

import ssl_kernels
from benchmarks import bench_moco, harness
from benchmarks.harness import Implementation

WITHOUT_COMPILING = {"plain PyTorch", "ssl_kernels native", "ssl_kernels chunked"}


@pytest.fixture(autouse=True)
def short_queue(monkeypatch):
    monkeypatch.setattr(bench_moco, "QUEUE_SIZE", 300)


def workload(make=bench_moco.moco, dtype=torch.float32):
    """Without torch.compile, which takes seconds."""
    made = make(33, 12, dtype, "cpu")
    made.implementations = [one for one in made.implementations if one.name in WITHOUT_COMPILING]
    return made


@pytest.mark.parametrize("make, dtype", [
    *((bench_moco.moco, dtype) for dtype in bench_moco.TOLERANCES),
    (bench_moco.moco_bfloat16_queue, torch.float32),
], ids=lambda value: getattr(value, "__name__", str(value)))  # fmt: skip
def test_implementations_agree(make, dtype):
    """With what is expected in float32 at least."""
    made = workload(make, dtype)
    assert made.expected()[0].dtype == torch.promote_types(dtype, torch.float32)
    case = harness.admit(made)
    assert not case.faults
    assert {"plain PyTorch", "ssl_kernels chunked"} <= {one.name for one in case.implementations}


def test_another_temperature_is_noticed():
    made = workload()
    other = Implementation("other", lambda *inputs: ssl_kernels.moco_loss(*inputs, 0.08))
    made.implementations.append(other)
    assert harness.admit(made).faults == ["other"]


def test_operations_and_bytes_are_those_of_the_queue():
    """Two products with the queue; it, the queries and the keys are read once, the queries' gradient is written."""
    made = workload(bench_moco.moco_bfloat16_queue)
    assert made.operations == 2 * 2 * 33 * 300 * 12
    assert made.bytes_moved == 2 * 300 * 12 + 3 * 4 * 33 * 12


def test_workloads_follow_the_options():
    options = argparse.Namespace(batch_sizes=[9, 4], quick=False, dim=5, dtype=torch.float64, device="cpu")
    made = [make() for make in bench_moco.workloads(options)]
    assert [one.sizes for one in made] == [{"B": size, "D": 5, "K": 300} for size in (4, 9)]
    options.dtype = torch.float32
    assert len(bench_moco.workloads(options)) == 4
