import argparse

import torch

from benchmarks import bench_momentum, harness
from benchmarks.harness import Implementation


def workload(dtype=torch.float32):
    return bench_momentum.momentum_update(1, 12, dtype, "cpu")


def test_implementations_agree():
    for dtype in (torch.float32, torch.bfloat16):
        case = harness.admit(workload(dtype))
        assert not case.faults
        assert {"two foreach calls", "ssl_kernels chunked"} <= {one.name for one in case.implementations}


def test_an_average_that_stays_is_noticed():
    made = workload()
    made.implementations.append(Implementation("other", lambda *sources: made.expected()[0] + 0.1))
    assert harness.admit(made).faults == ["other"]


def test_bytes_are_those_of_masters_shadows_and_sources():
    """float32 masters and bfloat16 shadows are read and written, bfloat16 sources read."""
    made = workload(torch.bfloat16)
    assert made.bytes_moved == sum(source.numel() for source in made.inputs) * (2 * (4 + 2) + 2)


def test_workloads_follow_the_options():
    options = argparse.Namespace(batch_sizes=[2, 1], quick=False, dim=6, dtype=torch.bfloat16, device="cpu")
    made = [make() for make in bench_momentum.workloads(options)]
    assert [one.sizes for one in made] == [{"L": count, "D": 6} for count in (1, 2)]
    options.dtype = torch.float64
    assert not bench_momentum.workloads(options)
