"""benchmarks/crowded.py: what it prints."""

import pytest

from benchmarks import crowded


def test_each_line_is_of_one_way_of_waiting(monkeypatch, capfd):
    """By a worker that prints how it waits and the batch size that it was given in the place of times."""
    worker = """
import json, os, sys
print(json.dumps({"plain": 1 + (os.environ.get("OMP_WAIT_POLICY") == "passive"), "ssl_kernels": int(sys.argv[2]) / 8}))
"""
    monkeypatch.setattr(crowded, "WORKER", worker)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    crowded.main(["--busy", "0", "--threads", "1", "--batch-size", "4", "--steps", "2"])
    lines = capfd.readouterr().out.splitlines()[1:]
    assert [line.split()[-3:] for line in lines] == [
        ["1000.00", "500.00", "2.00"],
        ["2000.00", "500.00", "4.00"],
    ]


@pytest.mark.slow
def test_steps_are_timed_with_and_without_passive_waiting(capfd):
    crowded.main(["--busy", "1", "--threads", "1", "--batch-size", "4", "--steps", "2"])
    lines = capfd.readouterr().out.splitlines()[1:]
    assert [line[:28].strip() for line in lines] == ["as it is", "OMP_WAIT_POLICY=passive"]
    for line in lines:
        plain, ours, ratio = map(float, line[28:].split())
        assert plain > 0
        assert ratio == pytest.approx(plain / ours, rel=0.1, abs=0.01)
