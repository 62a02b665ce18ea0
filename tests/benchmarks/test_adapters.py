import argparse

import pytest
import torch

from benchmarks import bench_adapters, harness


@pytest.mark.parametrize("loss", bench_adapters.LOSSES, ids=str)
def test_losses_agree(loss):
    workload = loss(8, 16, torch.float32, "cpu")
    case = harness.admit(workload)
    assert not case.faults, case.left_out
    missing = {one.name for one in workload.implementations if one.missing}
    assert {one.name for one in case.implementations} == {"original", "ssl_kernels"} - missing


@pytest.mark.parametrize("mixer", bench_adapters.MIXERS, ids=lambda made: "-".join(map(str, made.args[:2])))
def test_mixers_agree(mixer):
    workload = mixer(6, 12, torch.float32, "cpu")
    assert not harness.admit(workload).faults


def test_an_adapter_that_is_wrong_is_refused(monkeypatch):
    monkeypatch.setattr(
        bench_adapters.adapters.sup_contrast.SupConLoss, "forward", lambda self, x, y: x.sum()
    )
    loss = next(one for one in bench_adapters.LOSSES if one.library == "sup_contrast")
    workload = loss(8, 16, torch.float32, "cpu")
    workload.expected = lambda: harness.loss_and_gradients(
        workload.implementations[0].function, workload.inputs
    )
    assert harness.admit(workload).faults == ["ssl_kernels"]


def test_every_library_is_measured():
    options = argparse.Namespace(batch_sizes=[4], quick=False, dim=8, dtype=torch.float32, device="cpu")
    assert len(bench_adapters.workloads(options)) == len(bench_adapters.LOSSES) + len(bench_adapters.MIXERS)
    named = {loss.library for loss in bench_adapters.LOSSES} | {
        mixer.args[0] for mixer in bench_adapters.MIXERS
    }
    assert named == set(bench_adapters.adapters.LIBRARIES)
