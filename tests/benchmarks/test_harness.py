import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks import harness, machine
from benchmarks.harness import Budget, Implementation
from tests.benchmarks.fakes import FakeClock, FakeProduct, square_sum, square_sum_workload

SHORT = Budget(seconds=0.0, least_rounds=5, sample_seconds=0.0)


def measure(implementations, clock, budget=SHORT, product_seconds=0.5, **about):
    case = harness.admit(square_sum_workload(implementations, **about))
    return harness.measure(case, budget, clock, FakeProduct(clock, product_seconds))


def test_spread_is_median_and_quartiles():
    assert harness.spread([5.0, 1.0, 4.0, 2.0, 3.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0}
    assert harness.spread([1.0, 2.0]) == {"median": 1.5, "q1": 1.25, "q3": 1.75}
    assert harness.spread([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}


def test_forward_and_step_are_what_the_clock_says():
    clock = FakeClock()
    record = measure([square_sum("ours", clock, 2.0, 3.0)], clock)
    entry = record["implementations"]["ours"]
    assert entry["forward_seconds"] == {"median": 2.0, "q1": 2.0, "q3": 2.0}
    assert entry["step_seconds"] == {"median": 5.0, "q1": 5.0, "q3": 5.0}
    assert entry["samples"] == 5


def test_ratio_is_taken_within_each_round():
    """Both slow down in the same rounds, by up to 16: the medians spread, the ratio does not."""
    clock = FakeClock()
    # Agreement, memory and a calibrating sample come before the rounds.
    paces = [1, 1, 1, 1, 2, 4, 8, 16]
    slow, fast = iter([6.0 * pace for pace in paces]), iter([2.0 * pace for pace in paces])
    plain = square_sum("plain", clock, lambda: next(slow), 0.0, baseline=True)
    ours = square_sum("ours", clock, lambda: next(fast), 0.0)
    entries = measure([plain, ours], clock)["implementations"]
    assert entries["plain"]["step_seconds"] == {"median": 24.0, "q1": 12.0, "q3": 48.0}
    assert entries["ours"]["step_seconds"] == {"median": 8.0, "q1": 4.0, "q3": 16.0}
    assert entries["ours"]["ratio_to"] == {"plain": {"median": 3.0, "q1": 3.0, "q3": 3.0}}
    assert entries["plain"]["ratio_to"] == {}


def test_ratio_has_the_spread_of_the_rounds():
    assert harness.ratio([2.0, 6.0, 10.0], [1.0, 1.0, 1.0]) == {"median": 6.0, "q1": 4.0, "q3": 8.0}


def test_rates_follow_from_the_median():
    clock = FakeClock()
    record = measure([square_sum("ours", clock, 2.0, 2.0)], clock, operations=512, bytes_moved=4096)
    entry = record["implementations"]["ours"]
    assert record["product"]["operations_per_second"] == 1024 / 0.5
    assert entry["operations_per_second"] == 128
    assert entry["fraction_of_product"] == 128 / 2048
    assert entry["bytes_per_second"] == 1024


def test_rates_are_none_where_the_workload_states_nothing():
    clock = FakeClock()
    entry = measure([square_sum("ours", clock, 1.0, 1.0)], clock)["implementations"]["ours"]
    assert entry["operations_per_second"] is entry["fraction_of_product"] is entry["bytes_per_second"] is None


def test_short_steps_are_repeated_within_a_sample():
    clock = FakeClock()
    budget = Budget(seconds=0.0, least_rounds=3, sample_seconds=1.0)
    entry = measure([square_sum("ours", clock, 0.125, 0.125)], clock, budget)["implementations"]["ours"]
    assert entry["calls_in_a_sample"] == 4
    assert entry["step_seconds"]["median"] == 0.25


def test_rounds_go_on_until_the_budget_is_spent():
    clock = FakeClock()
    budget = Budget(seconds=40.0, least_rounds=3, sample_seconds=0.0)
    record = measure([square_sum("ours", clock, 0.5, 0.5)], clock, budget, product_seconds=1.0)
    samples, products = record["implementations"]["ours"]["samples"], record["product"]["samples"]
    assert samples + products == pytest.approx(40, abs=1)
    assert products == pytest.approx(10, abs=1)  # a quarter of the time


def test_every_round_times_everything():
    clock, calls = FakeClock(), []
    implementations = [
        square_sum(name, clock, lambda name=name: calls.append(name) or 1.0, 0.0) for name in ("a", "b", "c")
    ]
    measure(implementations, clock, Budget(seconds=0.0, least_rounds=6, sample_seconds=0.0))
    rounds = [tuple(calls[start : start + 3]) for start in range(len(calls) - 18, len(calls), 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds)) > 1  # in changing order


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_wrong_loss_is_refused(factor):
    clock = FakeClock()
    right, wrong = square_sum("right", clock, 1.0, 1.0), square_sum("wrong", clock, 1.0, 1.0, factor)
    case = harness.admit(square_sum_workload([wrong, right]))
    assert case.faults == ["wrong"]
    assert case.left_out["wrong"].startswith("refused: error of the loss ")
    record = harness.measure(case, SHORT, clock, FakeProduct(clock))
    assert list(record["implementations"]) == ["right"]
    assert record["left_out"] == case.left_out


def test_wrong_gradient_is_refused():
    def half_detached(x):
        return (x.square() / 2 + x.detach().square() / 2).sum()

    case = harness.admit(square_sum_workload([Implementation("wrong", half_detached)]))
    assert case.left_out == {"wrong": "refused: error of the gradients 0.5, tolerance 1e-05"}


def test_failing_implementation_is_refused():
    def fails(x):
        raise RuntimeError("no such kernel\nsecond line")

    case = harness.admit(square_sum_workload([Implementation("broken", fails)]))
    assert case.left_out == {"broken": "refused: RuntimeError: no such kernel"}
    assert case.faults == ["broken"]


def test_missing_and_too_large_are_left_out_without_fault():
    clock = FakeClock()
    missing = Implementation("missing", None, missing="it is not installed")
    large = square_sum("large", clock, 1.0, 1.0, extra_bytes=3_000_000_000)
    case = harness.admit(square_sum_workload([missing, large]), free_bytes=2_000_000_000)
    assert case.left_out == {
        "missing": "it is not installed",
        "large": "it needs about 3.0 GB, 2.0 GB are free",
    }
    assert not case.faults


def test_extra_memory_leaves_out_inputs_and_gradients():
    x = torch.rand(1_000_000, requires_grad=True)  # 4 MB

    def holds_two_more(x):
        return (x.exp() * x.sin()).sum()  # keeps exp and sin, then its product passes by

    assert harness.measure_extra_bytes(lambda x: x.sum(), [x]) < 1000
    assert 8_000_000 <= harness.measure_extra_bytes(holds_two_more, [x]) <= 16_000_100


def test_record_is_json():
    clock = FakeClock()
    record = measure([square_sum("ours", clock, 1.0, 1.0)], clock, operations=3)
    assert json.loads(json.dumps(record)) == record


def test_cpu_clock_is_in_seconds():
    clock = harness.clock_of("cpu")
    start = clock.mark()
    while clock.seconds_between(start, clock.mark()) < 1e-3:
        pass
    assert clock.seconds_between(start, clock.mark()) >= 1e-3


GROWTH = """
import gc, pathlib, re
import torch
from benchmarks import harness
from ssl_kernels.recipes.baseline import plain_nt_xent_loss

def megabytes(field):
    return 1024e-6 * int(re.search(field + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
views = [torch.randn(512, 16, requires_grad=True) for _ in range(2)]
harness.loss_and_gradients(plain_nt_xent_loss, views)
gc.collect()
before = megabytes("VmRSS")
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
harness.loss_and_gradients(plain_nt_xent_loss, views)
print(megabytes("VmHWM") - before, 1e-6 * harness.measure_extra_bytes(plain_nt_xent_loss, views))
"""


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's peak resident size"
)
def test_extra_memory_is_what_the_process_grows_by():
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system
    result = subprocess.run(
        [sys.executable, "-c", GROWTH],
        cwd=machine.CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    growth, measured = map(float, result.stdout.split())
    assert growth == pytest.approx(measured, rel=0.05)
    assert measured > 12  # three 4 MB matrices
