"""`make card`: its stages end in time, leave what they found, and all run without a GPU."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch

from benchmarks.card import __main__ as card
from benchmarks.card import guard
from benchmarks.card.cases import cases
from benchmarks.card.probe import Probe
from benchmarks.machine import CHECKOUT


def python(code):
    return [sys.executable, "-c", code]


def run_of(tmp_path, stages, seconds=300.0, dry=False):
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


def test_findings_are_stored_while_their_stage_runs(tmp_path, monkeypatch):
    """A run that is killed without a warning leaves them: the stage itself looks."""
    monkeypatch.setattr(card, "WRITE_SECONDS", 0.1)
    looks = f"""
        import pathlib, time
        print('{{"section": "edges", "name": "a", "result": 1}}', flush=True)
        path, end = pathlib.Path({str(tmp_path / "card.json")!r}), time.monotonic() + 120
        while not (path.exists() and '"result": 1' in path.read_text()):
            assert time.monotonic() < end
            time.sleep(0.05)
    """
    failed, record, _ = run_of(tmp_path, [card.Stage("looks", 150, python(textwrap.dedent(looks)))])
    assert failed == 0 and record["findings"] == [{"section": "edges", "name": "a", "result": 1}]


def test_a_signal_ends_every_stage_and_leaves_what_they_found(tmp_path):
    says = 'print(\'{"section": "edges", "name": "%s", "result": 1}\', flush=True)'
    waits = f"import os, signal, time; {says}; open({str(tmp_path)!r} + '/pid', 'w').write(str(os.getpid()))"
    stages = [
        card.Stage("behind", 250, python(waits % "a" + "; time.sleep(300)"), background=True),
        card.Stage(
            "stopped",
            250,
            python(
                f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'pid')!r}).exists(): time.sleep(.05)\n"
                + waits.replace("/pid", "/other") % "b"
                + "; os.kill(os.getppid(), signal.SIGTERM); time.sleep(300)"
            ),
        ),
        card.Stage("never begun", 60, python("")),
    ]
    before, begin = signal.getsignal(signal.SIGTERM), time.monotonic()
    with pytest.raises(card.Stopped, match="SIGTERM"):
        run_of(tmp_path, stages)
    assert time.monotonic() - begin < 200 and signal.getsignal(signal.SIGTERM) is before
    record = json.loads((tmp_path / "card.json").read_text())
    assert {finding["name"] for finding in record["findings"]} == {"a", "b"}
    assert {stage["name"]: stage["note"] for stage in record["stages"]} == dict.fromkeys(
        ("behind", "stopped"), "stopped by SIGTERM"
    )
    for name in ("pid", "other"):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)


def test_a_stage_ends_with_a_run_that_is_killed(tmp_path):
    run = f"""
        import sys
        from pathlib import Path
        from benchmarks.card import __main__ as card
        stage = "import os, time; print(os.getpid(), flush=True); time.sleep(300)"
        card.Run(Path({str(tmp_path)!r}), {{}}, 60, False).run([card.Stage("stays", 60, [sys.executable, "-c", stage])])
    """
    killed = subprocess.Popen(python(textwrap.dedent(run)), cwd=CHECKOUT)
    printed, end = tmp_path / ".stays.out", time.monotonic() + 200
    while not (printed.exists() and printed.read_text().endswith("\n")):
        assert time.monotonic() < end
        time.sleep(0.05)
    killed.kill()
    killed.wait()
    stage = f"/proc/{int(printed.read_text())}"
    while os.path.exists(stage) and "zombie" not in open(f"{stage}/status").read():
        assert time.monotonic() < end
        time.sleep(0.05)


ATTEMPTS = """
import os, signal, sys, time
first, progress = int(sys.argv[2]), int(sys.argv[4])
made = [
    ("dies", lambda: os.kill(os.getpid(), signal.SIGSEGV)),
    ("hangs", lambda: time.sleep(300)),
    ("loses the GPU", lambda: print('{"section": "edges", "name": "loses the GPU", "error": "it"}', flush=True)
                              or os._exit(75)),
    ("exits", lambda: os._exit(3)),
    ("works", lambda: print('{"section": "edges", "name": "works", "result": 1}', flush=True)),
]
for number, (name, function) in list(enumerate(made))[first:]:
    os.write(progress, f"{number}\\tedges\\t{name}\\n".encode())
    function()
"""


def test_an_attempt_that_ends_its_process_costs_only_itself(capfd):
    assert guard.main(["1", *python(ATTEMPTS)]) == 1
    found = card.findings_in(capfd.readouterr().out)
    assert [(finding["name"], finding.get("error", finding.get("result"))) for finding in found] == [
        ("dies", "its process died of SIGSEGV"),
        ("hangs", "its process was ended after 1 s"),
        ("loses the GPU", "it"),
        ("exits", "its process ended with exit code 3"),
        ("works", 1),
    ]


def test_a_program_that_makes_no_attempt_is_not_started_again(capfd):
    assert guard.main(["9", *python("print('once', flush=True); raise SystemExit(3)")]) == 1
    assert guard.main(["9", *python("")]) == 0
    assert capfd.readouterr().out == "once\n"


def test_the_probe_ends_where_the_gpu_is_lost(capsys):
    def loses():
        probe.synchronize = fails
        fails()

    def fails():
        raise RuntimeError("an illegal memory access")

    reading, writing = os.pipe()
    probe = Probe(True, first=1, progress=writing)
    probe.attempt("edges", "made before", fails)
    probe.attempt("edges", "raises", lambda: {}["key"])
    probe.attempt("edges", "prints for itself", lambda: None)
    with pytest.raises(SystemExit) as ended:
        probe.attempt("edges", "loses it in a round", lambda: probe.rounds({"native": loses}))
    assert ended.value.code == guard.LOST
    os.close(writing)
    with os.fdopen(reading) as progress:
        assert (
            progress.read()
            == "1\tedges\traises\n2\tedges\tprints for itself\n3\tedges\tloses it in a round\n"
        )
    found = card.findings_in(capsys.readouterr().out)
    assert [finding["error"] for finding in found] == [
        "KeyError: 'key'",
        "RuntimeError: native: RuntimeError: an illegal memory access",
    ]


def test_a_test_that_fails_is_a_finding_and_one_that_hangs_ends_its_process(tmp_path):
    (tmp_path / "test_planted.py").write_text(
        "import time\n"
        "def test_passes(): pass\n"
        "def test_raises(): raise ValueError('so\\nlong')\n"
        "def test_hangs(): time.sleep(300)\n"
    )
    stage = card.Stage("tests", 250, card._pytest(str(tmp_path / "test_planted.py"), workers=0, test=2))
    failed, record, by_name = run_of(tmp_path, [stage])
    (found,) = record["findings"]
    assert found["name"].endswith("test_planted.py::test_raises") and found["error"] == "ValueError: so long"
    assert failed == 1 and by_name["tests"]["seconds"] < 200
    assert "in test_hangs" in (tmp_path / "card.log").read_text()


def test_which_stages_go_on_behind_a_crash(tmp_path):
    """Those that time and test; a profiler or checker looks at the process that it starts, not at one behind it."""
    stages = {stage.name: stage for stage in card.card_stages(tmp_path)}
    for stage in stages.values():
        assert not (stage.needs and "benchmarks.card.guard" in stage.command), stage.name
        if "pytest" in stage.command:
            assert ("-n" in stage.command) == (not stage.needs), stage.name
    assert {name for name, stage in stages.items() if "benchmarks.card.guard" in stage.command} == {
        "speed", "mixing", "edges", "torch.compile",
    }  # fmt: skip


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
