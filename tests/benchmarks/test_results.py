import copy
import json

import numpy as np
import pytest
from PIL import Image

from benchmarks import figures, harness, results
from tests.benchmarks.fakes import FakeClock, FakeProduct, square_sum, square_sum_workload
from tests.benchmarks.test_machine import MACHINE


@pytest.fixture(scope="module")
def record():
    """Two sizes; "other" is installed for the first only."""
    cases = []
    for rows in (4, 32):
        clock = FakeClock()
        implementations = [
            square_sum("ours", clock, 1e-3 * rows, 1e-3 * rows),
            square_sum("plain", clock, 4e-3 * rows, 2e-3 * rows, baseline=True),
            square_sum("other", clock, 0.4, 0.4, baseline=True, missing="too far" if rows > 4 else None),
        ]
        workload = square_sum_workload(implementations, rows, operations=1000, bytes_moved=8_000_000 * rows)
        budget = harness.Budget(seconds=0.0, least_rounds=3, sample_seconds=0.0)
        case = harness.admit(workload)
        cases.append(harness.measure(case, budget, clock, FakeProduct(clock, 1e-2)))
    return results.make_record("sums", {"quick": False}, MACHINE, cases)


def test_tables(record):
    text = results.format_record(record)
    times, gains = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [cell.strip() for cell in times[0].strip("|").split("|")] == [
        "B",
        "plain, ms",
        "other, ms",
        "ours, ms",
    ]
    assert [cell.strip() for cell in times[2].strip("|").split("|")] == [
        "4",
        "24.0 [24.0, 24.0]",
        "800 [800, 800]",
        "8.00 [8.00, 8.00]",
    ]
    assert [cell.strip() for cell in times[3].strip("|").split("|")][2] == "–"
    first = dict(
        zip(*[[cell.strip() for cell in gains[i].strip("|").split("|")] for i in (0, 2)], strict=True)
    )
    assert first["× plain"] == "**3.00** [3.00, 3.00]"
    assert first["× other"] == "**100** [100, 100]"
    assert first["ours: forward, ms"] == "4.00 [4.00, 4.00]"
    assert first["GB/s"] == "4.0"
    assert first["of product rate"] == "1.22"  # 1000 operations in 8 ms, a product's 1024 in 10
    assert len({len(line) for line in times}) == 1
    assert "Left out at B = 32: other, too far." in text
    assert text.endswith("ssl_kernels 0.1.0 at 012345678 with changes")


def test_stored_and_read_again(record, tmp_path):
    path = results.write_record(record, tmp_path, "sums")
    assert path == tmp_path / "amd-epyc-9r14-r-2-cores-avx512" / "sums.csv"
    assert results.read_record(path) == record
    assert len(path.read_text().splitlines()) == 2 + 3 * len(record["cases"])  # measured or left out
    assert path.with_suffix(".md").read_text() == results.format_record(record) + "\n"


def test_what_cells_hold_comes_back(record, tmp_path):
    """None and empty dictionaries, texts with commas and quotes, and sizes that only a later case has."""
    varied = copy.deepcopy(record)
    first, second = varied["cases"]
    first["operations"] = None
    first["loss"] = 'sums, "odd" ones'
    second["sizes"] = second["sizes"] | {"K": 5}
    second["implementations"]["ours"]["ratio_to"] = {}
    second["left_out"]["other"] = "1.5"
    found = results.read_record(results.write_record(varied, tmp_path, "sums"))
    assert found == varied


def test_record_of_another_schema_is_not_read(record, tmp_path):
    path = tmp_path / "old.csv"
    path.write_text(f"# {json.dumps({'schema': 0})}\n")
    with pytest.raises(ValueError, match="schema must be 2, got 0"):
        results.read_record(path)


def test_digits():
    times = [
        results.format_time(dict.fromkeys(("median", "q1", "q3"), t)) for t in (1.234e-4, 1.2e-3, 0.0333, 2)
    ]
    assert [text.split()[0] for text in times] == ["0.123", "1.20", "33.3", "2000"]


def test_figure_has_curves(record, tmp_path):
    path = figures.draw_record(record, tmp_path / "sums")
    assert path == tmp_path / "sums.png"
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert pixels.shape[1] > 1000
    for color, _ in (figures.OUR_STYLES[0], figures.BASELINE_STYLES[0], figures.BASELINE_STYLES[1]):
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(axis=-1).sum() > 20


def test_what_stands_between_two_marks_is_replaced():
    page = results.replaced_between("above\n<a>\nold\n<end>\nbelow\n<end>\n", "<a>\n", "<end>\n", "new\n")
    assert page == "above\n<a>\nnew\n<end>\nbelow\n<end>\n"


def test_figure_without_ours(record, tmp_path):
    baselines_only = copy.deepcopy(record)
    for case in baselines_only["cases"]:
        del case["implementations"]["ours"]
    assert "× plain" not in results.format_record(baselines_only)
    assert figures.draw_record(baselines_only, tmp_path / "sums").exists()


def test_one_figure_for_all_losses_of_several_sizes(record, tmp_path):
    more = copy.deepcopy(record)
    other = copy.deepcopy(record["cases"])
    alone = copy.deepcopy(record["cases"][0])
    for case in other:
        case["loss"] = "other"
    alone["loss"] = "alone"
    more["cases"] += [*other, alone]
    heights = [Image.open(figures.draw_record(each, tmp_path / "sums")).size[1] for each in (record, more)]
    assert 1.7 * heights[0] < heights[1] < 2.2 * heights[0]
    assert figures.draw_record(record | {"cases": [alone]}, tmp_path / "alone") is None
