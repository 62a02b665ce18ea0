"""Writes the table of speed in docs/migration.md from a stored result: `python -m benchmarks.adapters_page CSV`."""

import pathlib
import sys

from benchmarks.machine import machine_line
from benchmarks.results import markdown_table, read_record

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "migration.md"
BEGIN, END = "<!-- written by benchmarks/adapters_page.py -->\n", "<!-- end of speed -->\n"
HEADER = ("class", "size", "original, ms", "adapter, ms", "×", "products alone, ms")


def milliseconds(seconds):
    return f"{1e3 * seconds:.3g}"


def row(case):
    """The cells of one measured case."""
    sizes = ", ".join(f"{name} = {value}" for name, value in case["sizes"].items())
    timed = case["implementations"]
    cells = [
        milliseconds(timed[name]["step_seconds"]["median"]) if name in timed else "–"
        for name in ("original", "ssl_kernels")
    ]
    ratio = timed.get("ssl_kernels", {}).get("ratio_to", {}).get("original")
    least = case["operations"] and case["operations"] / case["product"]["operations_per_second"]
    return [
        f"`{case['loss'].split()[0]}`{case['loss'].partition(' ')[1]}{case['loss'].partition(' ')[2]}",
        sizes,
        *cells,
        "–" if ratio is None else f"{ratio['median']:.3g}",
        milliseconds(least) if least else "",
    ]


def section(record):
    """The table, and below it the machine and what was left out."""
    lines = [markdown_table(HEADER, [row(case) for case in record["cases"]]), ""]
    for case in record["cases"]:
        for name, reason in case["left_out"].items():
            size = next(iter(case["sizes"].values()))
            lines.append(f"{case['loss']} at B = {size}, {name}: {reason}.")
    return "\n".join([*lines, "", machine_line(record["machine"]) + "."]) + "\n"


def with_section(page, lines):
    before, rest = page.split(BEGIN)
    return before + BEGIN + lines + END + rest.split(END)[1]


def main(arguments):
    record = read_record(pathlib.Path(arguments[0]))
    PAGE.write_text(with_section(PAGE.read_text(), section(record)))
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
