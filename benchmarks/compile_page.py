"""Writes the table of docs/benchmarks.md that compares every loss with torch.compile: `python -m
benchmarks.compile_page CSV`, of `python -m benchmarks compile`.
"""

import pathlib
import sys

from benchmarks.adapters_page import milliseconds
from benchmarks.machine import machine_line
from benchmarks.results import markdown_table, read_record, replaced_between

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- written by benchmarks/compile_page.py -->\n", "<!-- end of torch.compile -->\n"


def ratios(record):
    """{loss: {threads: {N: case}}} of the cases in which both were timed."""
    found = {}
    for case in record["cases"]:
        loss, _, threads = case["loss"].rpartition(", ")
        if {"torch.compile", "ssl_kernels"} <= set(case["implementations"]):
            by_threads = found.setdefault(loss, {})
            by_threads.setdefault(threads, {})[case["sizes"]["N"]] = case
    return found


def ratio(case):
    return case["implementations"]["ssl_kernels"]["ratio_to"]["torch.compile"]["median"]


def cell(by_threads, counts, size):
    cases = [by_threads.get(threads, {}).get(size) for threads in counts]
    while cases and cases[-1] is None:
        cases.pop()
    return " / ".join("–" if case is None else f"{ratio(case):.2f}" for case in cases) or "–"


def slower(loss, threads, size, case):
    """What is said of a case in which torch.compile is faster."""
    ours, theirs = (
        case["implementations"][name]["step_seconds"]["median"] for name in ("ssl_kernels", "torch.compile")
    )
    said = f"{loss}, N = {size}, {threads}: {milliseconds(ours)} ms, torch.compile {milliseconds(theirs)}"
    least = case["operations"] / case["product"]["operations_per_second"] if case["operations"] else 0
    if least >= 1e-6:
        said += f", products of that size {milliseconds(least)}"
    return said


def section(record):
    """The table, and below it where torch.compile is faster, and the machine."""
    found = ratios(record)
    counts = sorted({threads for by_threads in found.values() for threads in by_threads})
    sizes = sorted({n for by_threads in found.values() for cases in by_threads.values() for n in cases})
    lines = [
        [f"{loss}, D = {next(iter(next(iter(by_threads.values())).values()))['sizes']['D']}"]
        + [cell(by_threads, counts, size) for size in sizes]
        for loss, by_threads in found.items()
    ]
    table = markdown_table([" / ".join(counts), *(f"N = {size}" for size in sizes)], lines)
    faster = [
        f"- {slower(loss, threads, size, case)}."
        for loss, by_threads in found.items()
        for threads, cases in by_threads.items()
        for size, case in cases.items()
        if ratio(case) < 1
    ]
    listed = ["torch.compile is faster at", "", *faster] if faster else ["torch.compile is faster nowhere."]
    return "\n".join([table, "", *listed, "", machine_line(record["machine"]) + "."]) + "\n"


def main(arguments):
    (path,) = arguments
    made = section(read_record(pathlib.Path(path)))
    PAGE.write_text(replaced_between(PAGE.read_text(), BEGIN, END, made))
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
