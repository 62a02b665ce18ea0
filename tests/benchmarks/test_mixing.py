import argparse

import pytest
import torch

import ssl_kernels
from benchmarks import bench_mixing, harness
from benchmarks.harness import Implementation

OPERATIONS = (*bench_mixing.IMAGE_OPERATIONS, bench_mixing.mixup_cross_entropy)


def workload(operation, dtype=torch.float32):
    """Without torch.compile, which takes seconds."""
    made = operation(5, 20, dtype, "cpu")
    made.implementations = [one for one in made.implementations if one.name != "torch.compile"]
    return made


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_implementations_agree(operation, dtype):
    case = harness.admit(workload(operation, dtype))
    assert not case.faults, case.left_out
    assert {one.baseline for one in case.implementations} == {False, True}


def test_another_lam_is_noticed():
    made = workload(bench_mixing.mixup_random)
    permutation, probe = bench_mixing.random_permutation(5, "cpu"), bench_mixing.Probe(made.inputs[0])
    other = Implementation("other", lambda x: probe(ssl_kernels.mixup(x, 0.31, permutation)))
    made.implementations.append(other)
    assert harness.admit(made).faults == ["other"]


def test_bytes_are_what_a_perfect_kernel_moves():
    """bfloat16: images, boxes and logits read once and written once, 8-bit images read, and the logits twice."""
    found = {made.loss: made.bytes_moved for made in (workload(each, torch.bfloat16) for each in OPERATIONS)}
    pixels, box, logits = 5 * 3 * 20 * 20, 5 * 3 * 11 * 11, 16 * 5 * 20
    assert found == dict.fromkeys(("mixup_random", "mixup_flip", "mixup_roll"), 2 * 2 * pixels) | {
        "cutmix": 2 * 2 * box,
        "mixup_normalize": (1 + 2) * pixels,
        "mixup_cross_entropy": 3 * 2 * logits,
    }


def test_measured_case():
    budget = harness.Budget(seconds=0.0, least_rounds=2, sample_seconds=0.0)
    made = workload(bench_mixing.mixup_flip)
    product = harness.ProductTimer(made.inputs[0], harness.clock_of("cpu"), size=64)
    record = harness.measure(harness.admit(made), budget, product=product)
    entry = record["implementations"]["ssl_kernels chunked"]
    assert entry["bytes_per_second"] > 0
    assert entry["ratio_to"].keys() == {"timm's formulation"}


def test_sizes():
    options = argparse.Namespace(batch_sizes=None, quick=False, dim=16, dtype=torch.float32, device="cpu")
    made = [make() for make in bench_mixing.workloads(options)]
    assert {one.sizes["B"] for one in made if "B" in one.sizes} == set(bench_mixing.BATCH_SIZES)
    assert {one.sizes["N"] for one in made if "N" in one.sizes} == {4096}
