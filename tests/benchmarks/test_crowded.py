"""benchmarks/crowded.py: what it prints."""

import pytest

from benchmarks import crowded


@pytest.mark.slow
def test_steps_are_timed_with_and_without_passive_waiting(capfd):
    crowded.main(["--busy", "1", "--threads", "1", "--batch-size", "4", "--steps", "2"])
    lines = capfd.readouterr().out.splitlines()[1:]
    assert [line[:28].strip() for line in lines] == ["as it is", "OMP_WAIT_POLICY=passive"]
    for line in lines:
        plain, ours, ratio = map(float, line[28:].split())
        assert plain > 0
        assert ratio == pytest.approx(plain / ours, rel=0.1, abs=0.01)
