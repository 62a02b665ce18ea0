"""`make card`: its stages end in time, leave what they found, and all run without a GPU."""

import json
import subprocess
import sys
import time

import pytest
import torch

from benchmarks.card import __main__ as card
from benchmarks.card.cases import cases
from benchmarks.card.probe import Probe
from benchmarks.machine import CHECKOUT


def python(code):
    return [sys.executable, "-c", code]


def run_of(tmp_path, stages, seconds=60.0, dry=False):
    run = card.Run(tmp_path, {"gpu": "a card"}, seconds, dry)
    failed = run.run(stages)
    record = json.loads((tmp_path / "card.json").read_text())
    return failed, record, {stage["name"]: stage for stage in record["stages"]}


def test_a_stage_that_hangs_costs_only_itself(tmp_path):
    stages = [
        card.Stage("hangs", 2, python("import time; print('begun', flush=True); time.sleep(60)")),
        card.Stage("after it", 20, python("print('reached')")),
    ]
    begin = time.monotonic()
    failed, _, by_name = run_of(tmp_path, stages)
    assert time.monotonic() - begin < 50
    assert failed == 1 and by_name["hangs"]["note"].startswith("stopped at its limit")
    assert by_name["hangs"]["tail"] == ["begun"] and by_name["after it"]["exit_code"] == 0
    assert "begun" in (tmp_path / "card.log").read_text()


def test_background_stages_are_awaited_by_those_that_need_them(tmp_path):
    made = tmp_path / "made"
    stages = [
        card.Stage("never awaited", 1, python("import time; time.sleep(60)"), background=True),
        card.Stage(
            "build", 30, python(f"import time; time.sleep(1); open({str(made)!r}, 'w')"), background=True
        ),
        card.Stage("meanwhile", 20, python(f"import os; print(os.path.exists({str(made)!r}))")),
        card.Stage(
            "uses it", 20, python(f"import os; print(os.path.exists({str(made)!r}))"), after=("build",)
        ),
    ]
    failed, record, by_name = run_of(tmp_path, stages)
    assert by_name["uses it"]["tail"] == ["True"] and by_name["build"]["exit_code"] == 0
    assert failed == 1 and by_name["never awaited"]["exit_code"] != 0
    names = [stage["name"] for stage in record["stages"]]
    assert names.index("never awaited") < names.index("uses it")  # stopped, not left beside what comes next


def test_what_cannot_run_is_left_out_and_said(tmp_path):
    stages = [
        card.Stage("fails", 5, python("raise SystemExit(3)")),
        card.Stage("no program", 20, ["no-such-profiler"], needs="no-such-profiler"),
        card.Stage("fits what is left", 1, python("import time; time.sleep(60)"), last=True),
        card.Stage("too late", 20, python("print('ran')")),
    ]
    failed, _, by_name = run_of(tmp_path, stages, seconds=9)
    assert failed == 1 and by_name["fails"]["exit_code"] == 3
    assert by_name["no program"]["note"] == "left out: no no-such-profiler on this machine"
    assert by_name["fits what is left"]["exit_code"] == 0
    assert by_name["too late"]["note"] == "left out: no time is left"


@pytest.mark.parametrize("dry", [False, True])
def test_findings_are_kept_and_faults_of_the_probe_count_in_a_dry_run(tmp_path, dry):
    lines = ['{"section": "edges", "name": "a", "error": "ValueError"}', "noise", '{"section": "edges", "na']
    failed, record, _ = run_of(
        tmp_path, [card.Stage("edges", 20, python(f"print({chr(10).join(lines)!r})"))], dry=dry
    )
    assert record["findings"] == [{"section": "edges", "name": "a", "error": "ValueError"}]
    assert failed == int(dry)


def test_a_failed_part_of_a_finding_is_a_failure():
    assert card.failed({"result": {"native": {"step_seconds": 1}, "triton": {"error": "it"}}})
    assert not card.failed({"name": "error at D = 1", "result": 0.0}) and not card.failed({"result": "done"})


def test_counters_of_a_profiler(tmp_path):
    path = tmp_path / "counters.csv"
    assert card.counters_in(path) == []
    path.write_text(
        "==PROF== Connected\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","contrastive_fwd_kernel","lts__t_bytes.sum","Mbyte","1,234.5"\n'
        '"0","contrastive_fwd_kernel","sm__throughput","%","n/a"\n'
        '"1","finish_rows_kernel","lts__t_bytes.sum","byte","7"\n'
    )
    first, second = card.counters_in(path)
    assert (
        first["kernel"] == "contrastive_fwd_kernel" and second["counters"]["lts__t_bytes.sum"]["value"] == 7
    )
    assert first["counters"]["lts__t_bytes.sum"] == {"value": 1234.5, "unit": "Mbyte"}
    assert first["counters"]["sm__throughput"]["value"] is None


def test_a_call_that_fails_has_its_error_in_place_of_its_time():
    def fails():
        raise ValueError("so\nlong")

    times = Probe(dry=True).rounds({"fails": fails, "runs": lambda: None})
    assert times["fails"] == "ValueError: so long" and times["runs"] >= 0


def test_cases_are_enough_and_distinct():
    named = [case.name for case in cases()]
    assert len(named) >= 28 and len(set(named)) == len(named)


def test_without_a_gpu_it_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert card.main([]) == 2 and "no GPU" in capsys.readouterr().out


def test_every_stage_runs_without_a_gpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.card", "--dry", "--seconds", "900", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    record = json.loads((tmp_path / "card.json").read_text())
    assert result.returncode == 0, [stage for stage in record["stages"] if stage["exit_code"]]
    assert {finding["section"] for finding in record["findings"]} == {
        "machine",
        "losses",
        "mixing",
        "edges",
        "once",
        "compiled",
        "compile_triton",
    }
    assert {stage["name"] for stage in record["stages"]} >= {
        "info",
        "check",
        "speed",
        "launchers on the card",
    }
