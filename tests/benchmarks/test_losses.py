import argparse

import pytest
import torch

from benchmarks import bench_losses, harness, plain_losses
from benchmarks.harness import Implementation

every_loss = pytest.mark.parametrize("loss", bench_losses.LOSSES, ids=lambda loss: loss.name)


def workload(loss, dtype=torch.float64, batch_size=9):
    """Without torch.compile, which takes seconds."""
    made = loss(batch_size, 12, dtype, "cpu")
    made.implementations = [one for one in made.implementations if one.name != "torch.compile"]
    return made


@pytest.fixture(autouse=True)
def few_negatives(monkeypatch):
    monkeypatch.setattr(bench_losses, "NEGATIVES", 31)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_implementations_agree(loss, dtype):
    case = harness.admit(workload(loss, dtype))
    assert not case.faults
    names = {one.name for one in case.implementations}
    assert names - {"ssl_kernels native"} == {
        "plain PyTorch",
        "ssl_kernels chunked" if loss.units else "ssl_kernels",  # which picks
    }


@every_loss
def test_expected_is_streamed_where_the_matrix_does_not_fit(loss, monkeypatch):
    name, ran = f"plain_{loss.function}_loss", []
    plain = getattr(plain_losses, name)
    monkeypatch.setattr(plain_losses, name, lambda *inputs: ran.append(name) or plain(*inputs))
    whole = workload(loss).expected()
    monkeypatch.setattr(bench_losses, "free_memory", lambda device: 0)
    torch.testing.assert_close(workload(loss).expected(), whole)
    assert len(ran) == (1 if loss.units else 2)  # those without units make no matrix


@every_loss
def test_another_loss_is_noticed(loss):
    made = workload(loss)
    plain = getattr(plain_losses, f"plain_{loss.function}_loss")
    made.implementations.append(Implementation("other", lambda *inputs: 1.01 * plain(*inputs)))
    assert harness.admit(made).faults == ["other"]


def test_operations_are_those_of_the_products():
    by_name = {loss.name: workload(loss).operations for loss in bench_losses.LOSSES}
    product = 2 * 9 * 9 * 12
    assert by_name["clip"] == 3 * product and by_name["sup_con"] == 1.5 * product
    assert by_name["dcl"] == 1.5 * 4 * product  # of twice as many rows
    assert by_name["byol"] is None


def test_sizes_asked_for():
    options = argparse.Namespace(batch_sizes=[7, 3], quick=False, dim=4, dtype=torch.float64, device="cpu")
    sizes = {
        (made.loss, *made.sizes.values()) for made in (make() for make in bench_losses.workloads(options))
    }
    assert {("clip", 3, 4), ("clip", 7, 4), ("clip_wide", 7, bench_losses.WIDE), ("byol", 3, 4)} <= sizes
    options = argparse.Namespace(batch_sizes=None, quick=True, dim=None, dtype=torch.float32, device="cpu")
    wanted = len(bench_losses.LOSSES) * len(bench_losses.QUICK_BATCH_SIZES)
    assert len(bench_losses.workloads(options)) == wanted
