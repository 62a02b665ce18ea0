"""`make card`: build for the GPU present, prove the kernels right, time them, and store what was found.

Stages run in the order of what matters most, each with a limit of its own within one for all, so that a stage that
hangs costs only itself; so does an attempt of a stage (guard.py) and a test (pytest_plugin.py). Everything printed
goes to card.log; machine, versions, stages and findings to card.json, written every few seconds and at the end of a
stage, for a run that is killed. Nothing is installed. With --dry the same stages run without a GPU, on samples and tiny
sizes.
"""

import argparse
import contextlib
import csv
import ctypes
import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import torch

from benchmarks.machine import CHECKOUT, describe_machine, machine_slug, usable_cores

PYTHON = sys.executable
RESULTS = pathlib.Path(__file__).resolve().parent.parent / "results"
COUNTERS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__inst_executed_pipe_tensor.sum",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "lts__t_bytes.sum",
    "dram__bytes.sum",
    "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",
)
DRY_LIMIT = 280  # seconds of any stage: only that of the whole run counts
DRY_LAUNCHERS = "test_any_dtypes and sm_90 and float16-torch or test_matches_float64 and sm_80-product-True"
PROFILED = "contrastive_.*|sigmoid_pairs_.*|batch_hard_.*|normalized_rows.*|finish_rows.*"
# The two largest files are half of the compilation, and one core works on each: their kernels in parallel.
SPLIT_COMPILE = {"NVCC_APPEND_FLAGS": "--split-compile=8"}
WRITE_SECONDS = 3


@dataclass
class Stage:
    """One command.

    Args:
        name: As the log and the JSON call it.
        limit: Seconds; less where less is left of the whole.
        command: What runs.
        background: Started, and waited for by the stages that name it in `after`.
        needs: A program without which the stage is left out, or None.
        last: Whether the stage runs only on what time is left: its limit may be less than it needs.
    """

    name: str
    limit: float
    command: list
    background: bool = False
    after: tuple = ()
    needs: str | None = None
    last: bool = False
    environment: dict = field(default_factory=dict)


def _probe(*arguments):
    return [PYTHON, "-m", "benchmarks.card.probe", *arguments]


def _guarded(*sections, attempt=40):
    """Sections whose attempts may take `attempt` seconds each."""
    return [PYTHON, "-m", "benchmarks.card.guard", str(attempt), *_probe(*sections)]


def _pytest(*arguments, workers=1, test=45):
    """Tests that may take `test` seconds each; a worker that dies is replaced, where xdist is there."""
    parallel = ["-n", str(workers)] if workers and importlib.util.find_spec("xdist") else []
    plugin = ["-p", "benchmarks.card.pytest_plugin", "--test-seconds", str(test)]
    return [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, *parallel, *arguments]


def _sanitized(*arguments):
    """For compute-sanitizer, which looks at the process that it starts alone, and slows it down."""
    return _pytest(*arguments, workers=0, test=600)


def card_stages(out):
    """On a machine with a GPU."""
    cores = usable_cores()
    most = max(1, cores - 2)
    shares = max(1, min(5, cores // 3))
    build = [PYTHON, "setup.py", "build_ext", "--inplace"]
    nice = ["nice", "-n", "10"] if shutil.which("nice") else []
    return [
        Stage(
            "build",
            240,
            build,
            background=True,
            environment={"SSL_KERNELS_CUDA": "1", "MAX_JOBS": str(most), **SPLIT_COMPILE},
        ),
        # Behind the build, which everything waits for.
        Stage(
            "build launchers",
            300,
            [*nice, PYTHON, "-m", "benchmarks.card.launchers"],
            background=True,
            environment=SPLIT_COMPILE,
        ),
        *[
            Stage(
                f"compile triton {i}",
                150,
                [*nice, *_probe("--compile-triton", f"{i}/{shares}")],
                background=True,
            )
            for i in range(shares)
        ],
        Stage("triton by a user's calls", 80, _pytest("tests/test_card.py", "-k", "triton", "--maxfail=5")),
        Stage("info", 20, [PYTHON, "-m", "ssl_kernels", "info"], after=("build",)),
        Stage("check", 60, [PYTHON, "-m", "ssl_kernels", "check", "--device", "cuda"]),
        Stage("a user's calls", 75, _pytest("tests/test_card.py", workers=min(6, most))),
        Stage(
            "speed",
            110,
            _guarded("machine", "losses"),
            after=tuple(f"compile triton {i}" for i in range(shares)),  # nothing beside it on the card
        ),
        Stage("mixing", 30, _guarded("mixing", attempt=15)),
        Stage("edges", 45, _guarded("edges", attempt=20)),
        Stage(
            "launchers on the card",
            75,
            _pytest("tests/cuda", "tests/triton", "--maxfail=15", workers=min(10, most)),
            after=("build launchers",),
        ),
        Stage(
            "counters",
            60,
            [
                "ncu",
                "--clock-control",
                "none",
                "--metrics",
                ",".join(COUNTERS),
                "--csv",
                "--log-file",
                str(out / "counters.csv"),
                "-k",
                f"regex:{PROFILED}",
                *_probe("once"),
            ],
            needs="ncu",
            last=True,
        ),
        Stage("torch.compile", 90, _guarded("compiled", attempt=60), last=True),
        Stage(
            "memory check",
            60,
            [
                "compute-sanitizer",
                "--tool",
                "memcheck",
                *_sanitized("-x", "tests/cuda/test_contrastive.py", "-k", "rectangle_in_both"),
            ],
            needs="compute-sanitizer",
            last=True,
        ),
        Stage(
            "race check",
            60,
            [
                "compute-sanitizer",
                "--tool",
                "racecheck",
                *_sanitized("-x", "tests/cuda/test_contrastive.py", "-k", "rectangle_in_both and bfloat16"),
            ],
            needs="compute-sanitizer",
            last=True,
        ),
    ]


def dry_stages():
    """Without a GPU: the same commands on samples, so that none of them breaks unnoticed."""
    return [
        Stage("compile triton 0", DRY_LIMIT, _probe("--dry", "--compile-triton", "0/9"), background=True),
        Stage(
            "triton by a user's calls",
            DRY_LIMIT,
            _pytest("tests/test_card.py", "-k", "triton", test=DRY_LIMIT),
        ),
        Stage("info", DRY_LIMIT, [PYTHON, "-m", "ssl_kernels", "info"]),
        Stage("check", DRY_LIMIT, [PYTHON, "-m", "ssl_kernels", "check", "--device", "cpu", "row_pairs"]),
        Stage("speed", DRY_LIMIT, _guarded("--dry", "machine", "losses", attempt=DRY_LIMIT)),
        Stage("mixing", DRY_LIMIT, _guarded("--dry", "mixing", attempt=DRY_LIMIT)),
        Stage("edges", DRY_LIMIT, _guarded("--dry", "edges", attempt=DRY_LIMIT), after=("compile triton 0",)),
        Stage(
            "launchers on the card",
            DRY_LIMIT,
            _pytest(
                "tests/cuda/test_queue_push.py",
                "tests/triton/test_row_pairs.py",
                "-k",
                DRY_LAUNCHERS,
                workers=0,
                test=DRY_LIMIT,
            ),
        ),
        Stage("counters", DRY_LIMIT, _probe("--dry", "once"), last=True),
        Stage("torch.compile", DRY_LIMIT, _guarded("--dry", "compiled", attempt=DRY_LIMIT), last=True),
    ]


class Run:
    """The stages of one run, and the two files it leaves."""

    def __init__(self, out, machine, seconds, dry):
        self.out, self.dry = out, dry
        self.end = time.monotonic() + seconds
        self.start = time.monotonic()
        self.record = {
            "schema": 1,
            "dry": dry,
            "machine": machine,
            "stages": [],
            "findings": [],
            "counters": [],
        }
        self.background = {}
        self.shown = None  # (stage, process, its output file, when it began) of the one in the foreground
        self.log = open(out / "card.log", "w")

    def say(self, line):
        line = f"=== {time.monotonic() - self.start:.0f} s: {line}"
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def run(self, stages):
        """All of them; the number of those that failed.

        Raises:
            Stopped: A signal asked for the end: all processes have ended and what they printed is stored.
        """
        with self.stopped_by_signals():
            try:
                self.run_all(stages)
            except Stopped as stopped:
                self.stop(str(stopped))
                raise
        self.log.close()
        return sum(one["exit_code"] not in (0, None) for one in self.record["stages"])

    @contextlib.contextmanager
    def stopped_by_signals(self):
        """The signals that end a program raise Stopped inside the block."""

        def stop(number, frame):
            for each in before:  # once
                signal.signal(each, signal.SIG_IGN)
            raise Stopped(f"stopped by {signal.Signals(number).name}")

        before = {}
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            before[number] = signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def stop(self, why):
        """Ends every stage that runs and stores what it printed."""
        running = [*self.background.values(), *([self.shown] if self.shown else [])]
        self.background.clear()
        self.shown = None
        for stage, process, path, began in running:
            end(process)
            self.conclude(stage, process, path, began, why, show=stage is running[-1][0])

    def run_all(self, stages):
        for stage in stages:
            if stage.needs and not shutil.which(stage.needs):
                self.store(stage, 0, None, f"left out: no {stage.needs} on this machine")
            elif stage.background:
                self.background[stage.name] = (stage, *self.begin(stage))
                self.say(f"{stage.name} begins in the background")
            else:
                for name in stage.after:
                    self.finish(name)
                self.end_overdue()
                left = self.end - time.monotonic()
                if left < min(10, stage.limit):
                    self.store(stage, 0, None, "left out: no time is left")
                    continue
                self.say(stage.name)
                self.wait(stage, *self.begin(stage), show=True)
        for name in list(self.background):
            self.finish(name)

    def begin(self, stage):
        """(process, its output file, when it began)."""
        path = self.out / f".{stage.name.replace(' ', '-')}.out"
        environment = {
            **os.environ,
            "PYTHONPATH": str(CHECKOUT),
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
            **stage.environment,
        }
        with open(path, "w") as output:
            process = subprocess.Popen(
                stage.command,
                cwd=CHECKOUT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        return process, path, time.monotonic()

    def end_overdue(self):
        """Stops what is in the background beyond its limit, where nobody waits for it, and in what comes next's way."""
        for name, (stage, _, _, began) in list(self.background.items()):
            if time.monotonic() - began > stage.limit:
                self.finish(name)

    def finish(self, name):
        if name in self.background:
            self.wait(*self.background.pop(name), show=False)

    def wait(self, stage, process, path, began, show):
        limit = max(1, min(stage.limit - (time.monotonic() - began), self.end - time.monotonic()))
        self.shown = (stage, process, path, began)
        deadline, note = time.monotonic() + limit, ""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                end(process)
                note = f"stopped at its limit of {time.monotonic() - began:.0f} s"
                break
            try:
                process.wait(min(left, WRITE_SECONDS))
                break
            except subprocess.TimeoutExpired:
                self.write()
        self.shown = None
        self.conclude(stage, process, path, began, note, show)

    def conclude(self, stage, process, path, began, note, show):
        """Stores how a stage whose process has ended went, or with a note why it was ended."""
        text = path.read_text(errors="replace")
        path.unlink()
        if show or process.returncode:
            print(text if show else text[-3000:], flush=True)
        print(f"--- {stage.name}\n{text}", file=self.log, flush=True)
        findings = findings_in(text)
        self.record["findings"] += findings
        if stage.name == "counters" and not self.dry:
            self.record["counters"] = counters_in(self.out / "counters.csv")
        code = 0 if note and stage.last else -signal.SIGKILL if note else process.returncode
        if self.dry and code == 0:  # on a card a failed attempt is a finding, here it is a fault of the probe
            code = int(any(map(failed, findings)))
        self.store(stage, time.monotonic() - began, code, note, tail=text.splitlines()[-12:])

    def store(self, stage, seconds, code, note, tail=()):
        ending = note or ("done" if code == 0 else f"failed with exit code {code}")
        self.say(f"{stage.name}: {ending} ({seconds:.0f} s)")
        self.record["stages"].append(
            {
                "name": stage.name,
                "seconds": round(seconds, 1),
                "exit_code": code,
                "note": note,
                "tail": list(tail),
            }
        )
        self.write()

    def write(self):
        """The record, and beside its findings those that running stages have printed so far."""
        running = [*self.background.values(), *([self.shown] if self.shown else [])]
        found = [one for *_, path, _ in running for one in findings_in(path.read_text(errors="replace"))]
        record = self.record | {"findings": self.record["findings"] + found}
        path = self.out / "card.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        temporary.replace(path)


def _die_with_parent():
    """In a stage's process: it ends when this run is killed, and does not stay on the GPU. Only Linux can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Stopped(BaseException):
    """A signal asked the run to end; the message says which."""


def end(process):
    """Kills a stage's process and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold what waits for a kernel
        process.wait(10)


def findings_in(text):
    """The lines of JSON that `probe` printed."""
    found = []
    for line in text.splitlines():
        if line.startswith('{"section"'):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue  # the line that a stopped stage was writing
    return found


def failed(finding):
    """Whether a finding tells of an attempt, or of a part of one, that raised."""
    result = finding.get("result")
    parts = result.values() if isinstance(result, dict) else ()
    return "error" in finding or any("error" in part for part in parts)


def counters_in(path):
    """Of ncu's CSV: a record per launch, its counters by name."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines() if line.startswith('"')]
    launches = {}
    for row in csv.DictReader(lines):
        launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"], "counters": {}})
        value = row["Metric Value"].replace(",", "")
        try:
            launch["counters"][row["Metric Name"]] = {"value": float(value), "unit": row["Metric Unit"]}
        except ValueError:
            launch["counters"][row["Metric Name"]] = {"value": None, "unit": row["Metric Unit"]}
    return list(launches.values())


def main(argv=None):
    """Run all stages; 1 if one failed, 2 without a GPU and without --dry."""
    parser = argparse.ArgumentParser(
        prog="make card", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="without a GPU: the same stages on tiny samples")
    parser.add_argument("--seconds", type=float, default=480, help="for everything (%(default)s)")
    parser.add_argument(
        "--out", type=pathlib.Path, help="folder of card.json and card.log, instead of results/"
    )
    options = parser.parse_args(argv)
    if not options.dry and not torch.cuda.is_available():
        print("make card: no GPU that torch can use here; CARD_ARGS=--dry tries the stages without one")
        return 2
    machine = describe_machine("cpu" if options.dry else "cuda")
    out = options.out or (CHECKOUT / "build" / "card" if options.dry else RESULTS / machine_slug(machine))
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, machine, options.seconds, options.dry)
    try:
        failed = run.run(dry_stages() if options.dry else card_stages(out))
    except Stopped as stopped:
        print(f"{stopped}; {out / 'card.json'} has what was found until then")
        return 1
    print(f"wrote {out / 'card.json'} and card.log beside it; stages that failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
