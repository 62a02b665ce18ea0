import argparse
import re

import pytest
import torch

import ssl_kernels
from benchmarks import bench_compile, compile_page, harness, machine
from benchmarks.harness import Implementation


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def few_others(monkeypatch):
    monkeypatch.setattr(bench_compile, "QUEUE", 31)
    monkeypatch.setattr(bench_compile, "PROTOTYPES", 30)


def workload(loss, batch_size=12):
    """In float64, without torch.compile, which takes seconds."""
    made = loss(batch_size, 1, None, torch.float64, "cpu")
    made.implementations[0].function = loss.plain
    return made


@pytest.mark.parametrize("loss", bench_compile.LOSSES, ids=lambda loss: loss.name)
def test_ours_is_the_plain_formulation(loss):
    made = workload(loss)
    made.implementations.append(Implementation("other", lambda *inputs: 1.01 * loss.plain(*inputs)))
    assert harness.admit(made).faults == ["other"]


def test_operations_are_those_of_the_products():
    """Of 12 rows: a product forward and one back for each operand with a gradient; where rows meet themselves, half a
    product forward and one back. None where the work is no product."""
    pairs = {
        "nt_xent": 1.5 * 24 * 24,
        "debiased_nt_xent": 1.5 * 24 * 24,
        "dcl": 1.5 * 24 * 24,
        "info_nce": 3 * 12 * 12,
        "moco": 2 * 12 * 31,  # the queue has no gradient
        "clip": 3 * 12 * 12,
        "matryoshka(clip)": 3 * 12 * 12 * (32 + 64 + 128) / 128,
        "siglip": 3 * 12 * 12,
        "sup_con": 1.5 * 12 * 12,
        "imix": 3 * 12 * 12,
        "triplet, batch-hard": 0.5 * 12 * 12,  # the gradient is of the hardest alone
        "triplet, soft margin": 0.5 * 12 * 12,
        "similarity_cross_entropy": 3 * 12 * 12,
        "multiple_negatives_ranking, a hard negative": 3 * 12 * 24,
        "multiple_negatives_ranking, four directions": 1.5 * 24 * 24,
        "sampled_softmax": 3 * 12 * 24,
        "mil_nce": 3 * 12 * 24,
        "distillation": (3 + 1) * 12 * 12,
        "uniformity": 1.5 * 12 * 12,
        "koleo": 0.5 * 12 * 12,
        "swav, 3000 prototypes": 3 * 4 * 12 * 30,
        "dino of features": (3 * 4 + 2) * 12 * 30,
        "barlow_twins": 3 * 12 * 12,  # the rows' matrix, which is smaller than the features'
        "vicreg": 2 * 2 * 12 * 12,  # as torch makes them, in full
    }
    for loss in bench_compile.LOSSES:
        count = pairs.pop(loss.name, None)
        assert workload(loss).operations == (count and int(2 * loss.dim * count)), loss.name
        if loss.name in ("barlow_twins", "vicreg"):
            assert loss.products(600) == (3 if loss.name == "barlow_twins" else 4) * 600 * 512
    assert not pairs


def test_every_loss_is_compared():
    named = {re.split(r"[ ,(]", loss.name)[0] for loss in bench_compile.LOSSES}
    assert {name.removesuffix("_loss") for name in ssl_kernels.losses.__all__} <= named


def test_sizes_and_threads_asked_for():
    options = argparse.Namespace(
        batch_sizes=[8, 2], quick=False, threads=None, dim=4, dtype=torch.float64, device="cpu"
    )
    made = [make() for make in bench_compile.workloads(options)]
    cases = {(one.loss, one.sizes["N"]) for one in made}
    assert len(cases) == len(made)
    assert {("clip, 1 thread", 2), ("clip, 2 threads", 8), ("koleo, 2 threads", 2)} <= cases
    assert ("triplet, batch-hard, 1 thread", 2) not in cases  # it has no triplet


def test_the_page_shows_ratios_and_names_what_is_slower():
    def case(loss, n, ours, theirs):
        def step(seconds):
            return {"step_seconds": {"median": seconds}}

        return {
            "loss": loss,
            "sizes": {"N": n, "D": 4},
            "operations": 10**6,
            "product": {"operations_per_second": 1e9},
            "implementations": {
                "torch.compile": step(theirs),
                "ssl_kernels": step(ours) | {"ratio_to": {"torch.compile": {"median": theirs / ours}}},
            },
        }

    refused = case("clip, 1 thread", 8, 1, 1)
    del refused["implementations"]["ssl_kernels"]
    record = {
        "machine": machine.describe_machine("cpu"),
        "cases": [
            case("clip, 1 thread", 2, 2e-3, 4e-3),
            refused,
            case("clip, 2 threads", 64, 4e-3, 2e-3),
            case("swav, 9 prototypes, 1 thread", 64, 1e-3, 3e-3),
        ],
    }
    lines = compile_page.section(record).splitlines()
    cells = [[each.strip() for each in line.strip("|").split("|")] for line in lines[:4]]
    assert cells[0] == ["1 thread / 2 threads", "N = 2", "N = 64"]
    assert cells[2] == ["clip, D = 4", "2.00", "– / 0.50"]
    assert cells[3] == ["swav, 9 prototypes, D = 4", "–", "3.00"]
    assert "- clip, N = 64, 2 threads: 4 ms, torch.compile 2, products of that size 1." in lines
