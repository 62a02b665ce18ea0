"""The workloads of `sigmoid_pairs` and `batch_hard`."""

import argparse
from functools import partial

import pytest
import torch

import ssl_kernels
from benchmarks import bench_batch_hard, bench_sigmoid_pairs, harness
from benchmarks.harness import Implementation

MAKERS = {"siglip": bench_sigmoid_pairs.siglip, "triplet": bench_batch_hard.triplet}
every_loss = pytest.mark.parametrize("loss", MAKERS)


def workload(loss, dtype=torch.float32, batch_size=12):
    """Without torch.compile, which takes seconds."""
    made = MAKERS[loss](batch_size, 16, dtype, "cpu")
    made.implementations = [one for one in made.implementations if one.name != "torch.compile"]
    return made


@every_loss
@pytest.mark.parametrize("dtype", list(bench_sigmoid_pairs.TOLERANCES), ids=str)
def test_implementations_agree(loss, dtype):
    case = harness.admit(workload(loss, dtype, batch_size=36))
    assert not case.faults
    assert {"plain PyTorch", "ssl_kernels chunked"} <= {one.name for one in case.implementations}


@pytest.mark.parametrize("loss, function", [
    ("siglip", lambda x, y, scale, bias: ssl_kernels.siglip_loss(x, y, scale, bias + 0.01)),
    ("triplet", partial(ssl_kernels.triplet_loss, margin=0.21)),
])  # fmt: skip
def test_another_loss_is_noticed(loss, function):
    made = workload(loss)
    made.implementations.append(Implementation("other", function))
    assert harness.admit(made).faults == ["other"]


@every_loss
def test_expected_is_streamed_where_the_matrix_does_not_fit(loss, monkeypatch):
    whole = workload(loss).expected()
    for module in (bench_sigmoid_pairs, bench_batch_hard):
        monkeypatch.setattr(module, "free_memory", lambda device: 100)
        monkeypatch.setattr(module, f"plain_{loss}_loss", None, raising=False)  # which makes the matrix
    streamed = workload(loss).expected()
    torch.testing.assert_close(streamed, whole)
    assert not torch.equal(streamed[1][0], whole[1][0])  # computed another way


def test_operations_are_those_of_the_products():
    """SigLIP's three whole products, and of the triplet loss one that is symmetric."""
    product = 2 * 12 * 12 * 16
    assert workload("siglip").operations == 3 * product and workload("triplet").operations == product / 2


@every_loss
def test_sizes_asked_for(loss):
    module = bench_sigmoid_pairs if loss == "siglip" else bench_batch_hard
    options = argparse.Namespace(batch_sizes=[8, 4], quick=False, dim=4, dtype=torch.float64, device="cpu")
    made = [make() for make in module.workloads(options)]
    assert [one.sizes for one in made] == [{"N": 4, "D": 4}, {"N": 8, "D": 4}]
    assert [one.loss for one in made] == [loss, loss]
