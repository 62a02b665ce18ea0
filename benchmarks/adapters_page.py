"""Writes the table of speed in docs/migration.md: `python -m benchmarks.adapters_page CSV...`, one file per number of
threads."""

import pathlib
import sys

from benchmarks.machine import machine_line
from benchmarks.results import markdown_table, read_record, replaced_between

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "migration.md"
BEGIN, END = "<!-- written by benchmarks/adapters_page.py -->\n", "<!-- end of speed -->\n"
COLUMNS = ("original, ms", "adapter, ms", "×", "× of products")
FROM_ROWS, TIMES = 256, 3.0  # what adapters are to reach


def milliseconds(seconds):
    return f"{1e3 * seconds:.3g}"


def times(case):
    """(of the original, of the adapter, how many times as fast, how many times as fast products alone would be)."""
    timed = case["implementations"]
    original, ours = (
        timed[name]["step_seconds"]["median"] if name in timed else None
        for name in ("original", "ssl_kernels")
    )
    ratio = timed.get("ssl_kernels", {}).get("ratio_to", {}).get("original")
    least = case["operations"] and case["operations"] / case["product"]["operations_per_second"]
    return original, ours, ratio and ratio["median"], original and least and original / least


def cells(case):
    """Those of one measured case, for one number of threads."""
    *seconds, ratio, most = times(case)
    return [
        *("–" if value is None else milliseconds(value) for value in seconds),
        "–" if ratio is None else f"{ratio:.3g}",
        "" if most is None else f"{most:.3g}",
    ]


def label(case):
    name, space, way = case["loss"].partition(" ")
    return f"`{name}`{space}{way}"


def size(case):
    return ", ".join(f"{name} = {value}" for name, value in case["sizes"].items())


def threads_of(record):
    count = record["machine"]["threads"]
    return f"{count} thread{'s' * (count != 1)}"


def below(records):
    """Tables of the cases of `FROM_ROWS` rows and more that are under `TIMES`, and of those of any size under 1."""
    lines = []
    for heading, limit, least in (
        (f"Under {TIMES:.3g} times, of {FROM_ROWS} rows and more", TIMES, FROM_ROWS),
        ("Slower than the original", 1, 0),
    ):
        rows = []
        for cases in zip(*(record["cases"] for record in records), strict=True):
            ratios = [times(case)[2] for case in cases]
            if cases[0]["sizes"]["B"] < least:
                continue
            if any(ratio is not None and ratio < limit for ratio in ratios):
                rows.append(
                    [label(cases[0]), size(cases[0]), *(cell for case in cases for cell in bound(case))]
                )
        if not rows:
            lines += [f"{heading}: none.", ""]
            continue
        header = ["class", "size"]
        for record in records:
            header += [f"{threads_of(record)}: ×", "× of products", "products' share of the adapter's time"]
        lines += [f"{heading}:", "", markdown_table(header, rows), ""]
    return lines


def bound(case):
    """How many times as fast as the original, how many times products alone would be, and their share of the time."""
    *_, ratio, most = cells(case)
    if not case["operations"]:
        return [ratio, most, ""]
    least = case["operations"] / case["product"]["operations_per_second"]
    return [ratio, most, f"{100 * least / times(case)[1]:.0f} %"]


def section(records):
    """The table, and below it the bounds, the machine and what was left out."""
    header = ["class", "size"]
    for record in records:
        first, *others = COLUMNS
        header += [f"{threads_of(record)}: {first}", *others]
    lines = []
    for cases in zip(*(record["cases"] for record in records), strict=True):
        if len({(case["loss"], size(case)) for case in cases}) != 1:
            raise ValueError(f"the results must have the same cases, got {[case['loss'] for case in cases]}")
        lines.append([label(cases[0]), size(cases[0]), *(cell for case in cases for cell in cells(case))])
    lines = [markdown_table(header, lines), "", *below(records)]
    left_out = {
        (label(case), case["sizes"]["B"], name): reason
        for record in records
        for case in record["cases"]
        for name, reason in case["left_out"].items()
    }
    lines += [f"{loss} at B = {rows}, {name}: {reason}." for (loss, rows, name), reason in left_out.items()]
    return "\n".join([*lines, "", *(machine_line(record["machine"]) + "." for record in records)]) + "\n"


def main(arguments):
    records = [read_record(pathlib.Path(path)) for path in arguments]
    PAGE.write_text(replaced_between(PAGE.read_text(), BEGIN, END, section(records)))
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
