import argparse

import pytest
import torch

from benchmarks import adapters_page, bench_adapters, harness, machine


@pytest.mark.parametrize("loss", bench_adapters.LOSSES, ids=str)
def test_losses_agree(loss):
    workload = loss(8, 16, torch.float32, "cpu")
    case = harness.admit(workload)
    assert not case.faults, case.left_out
    missing = {one.name for one in workload.implementations if one.missing}
    assert {one.name for one in case.implementations} == {"original", "ssl_kernels"} - missing
    assert "ssl_kernels" not in missing or loss.library in bench_adapters.NEEDED


@pytest.mark.parametrize("mixer", bench_adapters.MIXERS, ids=lambda made: "-".join(map(str, made.args[:2])))
def test_mixers_agree(mixer):
    workload = mixer(6, 12, torch.float32, "cpu")
    assert not harness.admit(workload).faults


def test_an_adapter_that_is_wrong_is_refused(monkeypatch):
    monkeypatch.setattr(
        bench_adapters.adapters.sup_contrast.SupConLoss, "forward", lambda self, x, y: x.sum()
    )
    loss = next(one for one in bench_adapters.LOSSES if one.library == "sup_contrast")
    workload = loss(8, 16, torch.float32, "cpu")
    workload.expected = lambda: harness.loss_and_gradients(
        workload.implementations[0].function, workload.inputs
    )
    assert harness.admit(workload).faults == ["ssl_kernels"]


def test_every_library_is_measured():
    options = argparse.Namespace(batch_sizes=[4], quick=False, dim=8, dtype=torch.float32, device="cpu")
    assert len(bench_adapters.workloads(options)) == len(bench_adapters.LOSSES) + len(bench_adapters.MIXERS)
    named = {loss.library for loss in bench_adapters.LOSSES} | {
        mixer.args[0] for mixer in bench_adapters.MIXERS
    }
    assert named == set(bench_adapters.adapters.LIBRARIES)


def test_the_page_shows_a_result():
    spread = {"median": 2e-3, "q1": 1e-3, "q3": 3e-3}
    entry = {"step_seconds": spread, "ratio_to": {"original": {"median": 4.0}}}
    case = {
        "loss": "lightly.NTXentLoss with a bank",
        "sizes": {"B": 256, "D": 4},
        "operations": 10**6,
        "product": {"operations_per_second": 1e9},
        "left_out": {},
        "implementations": {"original": {"step_seconds": {"median": 8e-3}}, "ssl_kernels": entry},
    }
    here = machine.describe_machine("cpu")
    records = [{"machine": here | {"threads": threads}, "cases": [case]} for threads in (1, 2)]
    name = "`lightly.NTXentLoss` with a bank"
    lines = adapters_page.section(records).splitlines()
    header, row = ([cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], lines[2]))
    assert header[2::4] == ["1 thread: original, ms", "2 threads: original, ms"]
    assert row == [name, "B = 256, D = 4", *["8", "2", "4", "8"] * 2]
    assert "Under 3 times, of 256 rows and more: none." in lines

    entry["ratio_to"]["original"]["median"] = 0.5
    lines = adapters_page.section(records).splitlines()
    for heading in ("Under 3 times, of 256 rows and more:", "Slower than the original:"):
        row = lines[lines.index(heading) + 4]
        assert [cell.strip() for cell in row.strip("|").split("|")] == [
            name,
            "B = 256, D = 4",
            *["0.5", "8", "50 %"] * 2,
        ]

    del case["implementations"]["original"], entry["ratio_to"]["original"]
    assert adapters_page.cells(case) == ["–", "2", "–", ""]
    with pytest.raises(ValueError, match="must have the same cases"):
        adapters_page.section([records[0], records[0] | {"cases": [case | {"loss": "another"}]}])


def test_the_page_has_its_place():
    page = adapters_page.PAGE.read_text()
    table = page.split(adapters_page.BEGIN)[1].split(adapters_page.END)[0]
    measured = {str(loss) for loss in bench_adapters.LOSSES}
    shown = {line.split(" | ")[0].strip("| ").replace("`", "") for line in table.splitlines()}
    assert measured <= shown
