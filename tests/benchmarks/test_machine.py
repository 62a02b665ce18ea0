import subprocess

import torch

from benchmarks import machine

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
