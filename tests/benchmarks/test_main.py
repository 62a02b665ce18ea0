import argparse
import importlib
import sys
import types

import pytest
import torch

from benchmarks import __main__ as main
from benchmarks import harness, results
from tests.benchmarks.fakes import FakeClock, square_sum, square_sum_workload


@pytest.fixture
def operation(monkeypatch):
    """A function that makes the given implementations the only operation, `sums`."""

    def install(*implementations):
        module = types.ModuleType("benchmarks.bench_sums")
        module.workloads = lambda options: [
            lambda rows=rows: square_sum_workload(implementations, rows) for rows in (4, 8)
        ]
        monkeypatch.setitem(sys.modules, "benchmarks.bench_sums", module)
        monkeypatch.setattr(main, "operations", lambda: ["sums"])
        monkeypatch.setattr(main, "QUICK", harness.Budget(0.0, 2, 0.0))
        monkeypatch.setattr(harness, "PRODUCT_SIZE", {"cpu": 16})

    return install


def test_run_stores_prints_and_draws(operation, tmp_path, capsys):
    clock = FakeClock()
    operation(square_sum("plain", clock, 1.0, 1.0, baseline=True), square_sum("ours", clock, 1.0, 1.0))
    assert main.main(["--quick", "--out", str(tmp_path)]) == 0
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        "sums-quick.csv",
        "sums-quick.md",
        "sums-quick.png",
    ]
    record = results.read_record(folder / "sums-quick.csv")
    assert record["op"] == "sums" and record["schema"] == results.SCHEMA
    assert record["machine"]["cpu"] and record["machine"]["torch"]
    assert record["settings"] == {
        "quick": True,
        "batch_sizes": None,
        "dim": None,
        "threads": None,
        "device": record["settings"]["device"],
        "dtype": "float32",
    }
    table = (folder / "sums-quick.md").read_text()
    printed = capsys.readouterr().out
    assert table.strip() in printed

    (folder / "sums-quick.png").unlink()
    assert main.main(["--show", str(folder / "sums-quick.csv")]) == 0
    assert table.strip() in capsys.readouterr().out
    assert (folder / "sums-quick.png").exists()


def test_progress_is_told_in_milliseconds():
    entry = {"step_seconds": {"median": 0.25}}
    record = {"loss": "sums", "sizes": {"B": 4, "D": 1}, "implementations": {"plain": entry, "ours": entry}}
    assert main.progress(record) == "sums B = 4, D = 1: ms plain 250, ours 250"


def test_refused_implementation_is_told_by_the_exit_code(operation, tmp_path, capsys):
    clock = FakeClock()
    operation(square_sum("right", clock, 1.0, 1.0), square_sum("wrong", clock, 1.0, 1.0, factor=2.0))
    assert main.main(["sums", "--quick", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.strip() == "refused: wrong"


def test_file_is_named_after_what_is_not_the_default(tmp_path):
    parser = argparse.ArgumentParser()
    main.add_arguments(parser)
    parse = parser.parse_args
    assert main.file_stem("contrastive", parse([])) == "contrastive"
    options = parse("--quick --dim 512 --dtype bfloat16 --threads 1 --batch-sizes 8 4".split())
    assert main.file_stem("contrastive", options) == "contrastive-dim512-bfloat16-threads1-batch4_8-quick"


@pytest.mark.parametrize("argv", [["nonsense"], ["--dim", "0"], ["--dtype", "int8"]], ids=str)
def test_bad_arguments_are_reported(argv, capsys):
    with pytest.raises(SystemExit) as error:
        main.main(argv)
    assert error.value.code == 2
    assert argv[-1] in capsys.readouterr().err


def test_operations_are_the_modules():
    assert "contrastive" in main.operations()


@pytest.mark.parametrize("op", main.operations())
def test_ratios_are_taken_to_what_is_not_ours(op):
    workloads = importlib.import_module(f"benchmarks.bench_{op}").workloads
    options = {"batch_sizes": [4], "quick": True, "dim": 48, "threads": torch.get_num_threads()}
    options = argparse.Namespace(**options, dtype=torch.float32, device="cpu")
    for make in workloads(options):
        for one in make().implementations:
            assert one.baseline != one.name.startswith("ssl_kernels"), one.name
