import os
import platform
import shutil
import subprocess

import pytest
import torch

from benchmarks import machine
from ssl_kernels.recipes import report

MACHINE = {
    "cpu": "AMD EPYC 9R14 (R)",
    "cores": 2,
    "threads": 1,
    "instruction_set": "avx512",
    "gpu": None,
    "memory_bytes": 24 * 2**30,
    "torch": "2.14.1",
    "ssl_kernels": "0.1.0",
    "commit": "0123456789abcdef",
    "modified": True,
}


def test_machine_names_what_a_number_depends_on():
    described = machine.describe_machine("cpu")
    assert described.keys() >= MACHINE.keys() | {"load_average", "system", "python"}
    assert described["cpu"] and described["gpu"] is None
    assert 1 <= described["cores"]
    assert described["threads"] == torch.get_num_threads()
    assert described["memory_bytes"] > 2**28
    assert described["torch"] == torch.__version__


def test_commit_is_that_of_the_checkout():
    commit, modified = machine.git_state()
    if commit is None:  # an unpacked archive
        assert modified is None
    else:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=machine.CHECKOUT, capture_output=True, text=True, check=True
        )
        assert commit == head.stdout.strip()
        assert isinstance(modified, bool)


def test_no_git_gives_no_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    assert machine.git_state() == (None, None)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_changes_are_those_of_tracked_files_but_results(monkeypatch, tmp_path):
    def git(*args):
        options = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        run = ["git", *options, *args]
        return subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    code, result = tmp_path / "code.py", tmp_path / "benchmarks" / "results" / "one.csv"
    result.parent.mkdir(parents=True)
    code.touch()
    result.touch()
    for args in (["init"], ["add", "."], ["commit", "-m", "first"]):
        git(*args)
    monkeypatch.setattr(machine, "CHECKOUT", tmp_path)
    commit = git("rev-parse", "HEAD")
    assert len(commit) == 40
    result.write_text("measured")
    (tmp_path / "new.py").touch()
    assert machine.git_state() == (commit, False)
    code.write_text("changed")
    assert machine.git_state() == (commit, True)


def test_slug():
    assert machine.machine_slug(MACHINE) == "amd-epyc-9r14-r-2-cores-avx512"
    assert machine.machine_slug(MACHINE | {"instruction_set": None}) == "amd-epyc-9r14-r-2-cores"
    assert machine.machine_slug(MACHINE | {"gpu": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"


def test_line():
    assert machine.machine_line(MACHINE) == (
        "AMD EPYC 9R14 (R), 2 cores, 1 thread, avx512, 24 GiB, torch 2.14.1,"
        " ssl_kernels 0.1.0 at 012345678 with changes"
    )
    assert machine.machine_line(MACHINE | {"commit": None, "modified": None}).endswith("ssl_kernels 0.1.0")


def test_free_memory_is_part_of_all():
    assert 0 < machine.free_memory("cpu") <= machine.total_memory()


def test_a_machine_without_proc(monkeypatch):
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    for processor, name in (("", "arm64"), ("Apple M2", "Apple M2")):
        monkeypatch.setattr(platform, "processor", lambda processor=processor: processor)
        monkeypatch.setattr(platform, "machine", lambda: "arm64")
        assert machine.cpu_name() == report._cpu_name() == name
    assert machine.free_memory("cpu") == machine.total_memory()
