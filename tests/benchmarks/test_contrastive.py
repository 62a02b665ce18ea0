import argparse

import pytest
import torch

import ssl_kernels
from benchmarks import bench_contrastive, harness
from benchmarks.harness import Implementation

WITHOUT_COMPILING = {"plain PyTorch", "lightly", "ssl_kernels native", "ssl_kernels chunked"}


def workload(dtype=torch.float32, batch_size=5, dim=12):
    """NT-Xent without torch.compile, which takes seconds."""
    made = bench_contrastive.nt_xent(batch_size, dim, dtype, "cpu")
    made.implementations = [one for one in made.implementations if one.name in WITHOUT_COMPILING]
    return made


@pytest.mark.parametrize("dtype", list(bench_contrastive.TOLERANCES), ids=str)
def test_implementations_agree(dtype):
    case = harness.admit(workload(dtype, batch_size=33))
    assert not case.faults
    assert {"plain PyTorch", "ssl_kernels chunked"} <= {one.name for one in case.implementations}


def test_another_temperature_is_noticed():
    made = workload()
    other = Implementation("other", lambda z0, z1: ssl_kernels.nt_xent_loss(z0, z1, 0.51))
    made.implementations.append(other)
    case = harness.admit(made)
    assert case.faults == ["other"]


def test_expected_is_streamed_where_the_matrix_does_not_fit(monkeypatch):
    whole = workload().expected()
    monkeypatch.setattr(bench_contrastive, "free_memory", lambda device: 1000)
    monkeypatch.setattr(bench_contrastive, "plain_nt_xent_loss", None)  # which makes the matrix
    streamed = workload().expected()
    torch.testing.assert_close(streamed, whole)
    assert not torch.equal(streamed[1][0], whole[1][0])  # computed another way


def test_operations_are_those_of_the_triangle():
    assert workload(batch_size=5, dim=12).operations == 4 * 10 * 10 * 12


def test_measured_case():
    budget = harness.Budget(seconds=0.0, least_rounds=2, sample_seconds=0.0)
    made = workload()
    product = harness.ProductTimer(made.inputs[0], harness.clock_of("cpu"), size=64)
    record = harness.measure(harness.admit(made), budget, product=product)
    assert record["product"]["size"] == 64 and record["product"]["dtype"] == "float32"
    assert (
        record["loss"] == "nt_xent" and record["sizes"] == {"B": 5, "D": 12} and record["dtype"] == "float32"
    )
    entry = record["implementations"]["ssl_kernels chunked"]
    assert 0 < entry["forward_seconds"]["median"] < entry["step_seconds"]["median"] < 10
    assert entry["ratio_to"].keys() >= {"plain PyTorch"}
    assert entry["fraction_of_product"] > 0


def test_sizes_asked_for():
    options = argparse.Namespace(batch_sizes=[7, 3], quick=False, dim=4, dtype=torch.float64, device="cpu")
    sizes = [make().sizes for make in bench_contrastive.workloads(options)]
    assert sizes == [{"B": 3, "D": 4}, {"B": 7, "D": 4}]
    options = argparse.Namespace(batch_sizes=None, quick=True, dim=None, dtype=torch.float32, device="cpu")
    assert len(bench_contrastive.workloads(options)) == len(bench_contrastive.QUICK_BATCH_SIZES)
