"""`make card`: build for the GPU present, prove the kernels right, time them, and store what was found.

Stages run in the order of what matters most, each with a limit of its own within one for all, so that a stage that
hangs costs only itself. Everything printed goes to card.log; machine, versions, stages and findings to card.json,
written after each stage. Nothing is installed. With --dry the same stages run without a GPU, on samples and tiny
sizes.
"""

import argparse
import contextlib
import csv
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


def _pytest(*arguments, workers=0):
    parallel = ["-n", str(workers)] if workers > 1 and importlib.util.find_spec("xdist") else []
    return [PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel, *arguments]


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
            _probe("machine", "losses"),
            after=tuple(f"compile triton {i}" for i in range(shares)),  # nothing beside it on the card
        ),
        Stage("mixing", 30, _probe("mixing")),
        Stage("edges", 45, _probe("edges")),
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
        Stage("torch.compile", 90, _probe("compiled"), last=True),
        Stage(
            "memory check",
            60,
            [
                "compute-sanitizer",
                "--tool",
                "memcheck",
                *_pytest("-x", "tests/cuda/test_contrastive.py", "-k", "rectangle_in_both"),
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
                *_pytest("-x", "tests/cuda/test_contrastive.py", "-k", "rectangle_in_both and bfloat16"),
            ],
            needs="compute-sanitizer",
            last=True,
        ),
    ]


def dry_stages():
    """Without a GPU: the same commands on samples, so that none of them breaks unnoticed."""
    return [
        Stage("compile triton 0", DRY_LIMIT, _probe("--dry", "--compile-triton", "0/9"), background=True),
        Stage("triton by a user's calls", DRY_LIMIT, _pytest("tests/test_card.py", "-k", "triton")),
        Stage("info", DRY_LIMIT, [PYTHON, "-m", "ssl_kernels", "info"]),
        Stage("check", DRY_LIMIT, [PYTHON, "-m", "ssl_kernels", "check", "--device", "cpu", "row_pairs"]),
        Stage("speed", DRY_LIMIT, _probe("--dry", "machine", "losses")),
        Stage("mixing", DRY_LIMIT, _probe("--dry", "mixing")),
        Stage("edges", DRY_LIMIT, _probe("--dry", "edges"), after=("compile triton 0",)),
        Stage(
            "launchers on the card",
            DRY_LIMIT,
            _pytest("tests/cuda/test_queue_push.py", "tests/triton/test_row_pairs.py", "-k", DRY_LAUNCHERS),
        ),
        Stage("counters", DRY_LIMIT, _probe("--dry", "once"), last=True),
        Stage("torch.compile", DRY_LIMIT, _probe("--dry", "compiled"), last=True),
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
        self.log = open(out / "card.log", "w")

    def say(self, line):
        line = f"=== {time.monotonic() - self.start:.0f} s: {line}"
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def run(self, stages):
        """All of them; the number of those that failed."""
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
        self.log.close()
        return sum(one["exit_code"] not in (0, None) for one in self.record["stages"])

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
        limit = min(stage.limit - (time.monotonic() - began), self.end - time.monotonic())
        timed_out = False
        try:
            process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            timed_out = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):  # a driver may hold what waits for a kernel
                process.wait(10)
        text = path.read_text(errors="replace")
        path.unlink()
        if show or process.returncode:
            print(text if show else text[-3000:], flush=True)
        print(f"--- {stage.name}\n{text}", file=self.log, flush=True)
        findings = findings_in(text)
        self.record["findings"] += findings
        if stage.name == "counters" and not self.dry:
            self.record["counters"] = counters_in(self.out / "counters.csv")
        note = f"stopped at its limit of {time.monotonic() - began:.0f} s" if timed_out else ""
        code = 0 if timed_out and stage.last else -signal.SIGKILL if timed_out else process.returncode
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
        path = self.out / "card.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.record, indent=1, ensure_ascii=False) + "\n")
        temporary.replace(path)


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
    failed = run.run(dry_stages() if options.dry else card_stages(out))
    print(f"wrote {out / 'card.json'} and card.log beside it; stages that failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
