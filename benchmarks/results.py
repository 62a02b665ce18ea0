"""What is stored of a benchmark, and the tables made of it.

A stored result is a CSV file. Its first line, after "# ", is JSON: the schema, the operation, the machine and the
settings. Each row below is one measurement, or an implementation that was left out and why. Cells are texts or JSON,
and empty where there is no value. A value within another is named by its path, such as `step_seconds/q1`.
"""

import csv
import json

from benchmarks.machine import machine_line, machine_slug

SCHEMA = 2  # of the stored file
SEPARATOR = "/"
TEXTS = ("loss", "dtype", "product/dtype", "implementation", "left_out")  # the others are JSON
PARTS = (
    "sizes",
    "left_out",
    "ratio_to",
    "errors",
)  # whose names differ between rows: an empty cell is no value


def make_record(op, settings, machine, cases):
    """All that is stored of one run.

    Args:
        op: The operation, "contrastive".
        settings: What was asked for, ready for JSON.
        machine: From `machine.describe_machine`.
        cases: From `harness.measure`.
    """
    return {"schema": SCHEMA, "op": op, "machine": machine, "settings": settings, "cases": cases}


def write_record(record, folder, stem):
    """Write `folder`/<machine>/<stem>.csv and its tables beside it as .md; the path of the CSV."""
    path = folder / machine_slug(record["machine"]) / f"{stem}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in record.items() if name != "cases"}
    rows = [row for case in record["cases"] for row in _rows(case)]
    columns = dict.fromkeys(name for part in (0, 1) for row in rows for name in row[part])
    with path.open("w", newline="") as file:
        file.write(f"# {json.dumps(head, ensure_ascii=False)}\n")
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(shared | own for shared, own in rows)
    path.with_suffix(".md").write_text(format_record(record) + "\n")
    return path


def read_record(path):
    with path.open(newline="") as file:
        record = json.loads(file.readline().removeprefix("# "))
        if record["schema"] != SCHEMA:
            raise ValueError(f"{path}: schema must be {SCHEMA}, got {record['schema']}")
        return record | {"cases": _cases(csv.DictReader(file))}


def _rows(case):
    """For each implementation the cells of its case, and its own: what was measured or why it was left out."""
    own = [{"implementation": name} | entry for name, entry in case["implementations"].items()]
    own += [{"implementation": name, "left_out": reason} for name, reason in case["left_out"].items()]
    shared = {name: value for name, value in case.items() if name not in ("implementations", "left_out")}
    return [(_flat(shared), _flat(entry)) for entry in own]


def _flat(row, path=()):
    """{column: cell} of a row of dictionaries."""
    cells = {}
    for name, value in row.items():
        column = SEPARATOR.join((*path, name))
        if isinstance(value, dict):
            cells |= _flat(value, (*path, name))
        else:
            cells[column] = value if column in TEXTS else "" if value is None else json.dumps(value)
    return cells


def _cases(lines):
    """The cases that `_rows` made the lines of."""
    cases = []
    for line in lines:
        shared, own = {}, {}
        half = shared
        for column, cell in line.items():
            if column == "implementation":
                half = own
                continue
            *path, name = column.split(SEPARATOR)
            if cell or not (path or column in PARTS):
                _put(half, path, name, (cell if column in TEXTS else json.loads(cell)) if cell else None)
        if not cases or any(cases[-1][name] != value for name, value in shared.items()):
            cases.append(shared | {"left_out": {}, "implementations": {}})
        if "left_out" in own:
            cases[-1]["left_out"][line["implementation"]] = own["left_out"]
        else:
            cases[-1]["implementations"][line["implementation"]] = own | {"ratio_to": own.get("ratio_to", {})}
    return cases


def _put(tree, path, name, value):
    for part in path:
        tree = tree.setdefault(part, {})
    tree[name] = value


def losses_of(record):
    """{loss: its cases}, in the order they were run."""
    losses = {}
    for case in record["cases"]:
        losses.setdefault(case["loss"], []).append(case)
    return losses


def names_of(cases):
    """The implementations timed in any of `cases`: baselines first, then ours."""
    entries = {name: entry for case in cases for name, entry in case["implementations"].items()}
    return sorted(entries, key=lambda name: not entries[name]["baseline"])


def ours_in(cases):
    """The first of our implementations timed in `cases`, whose ratios are shown; None without any."""
    timed = {name: entry["baseline"] for case in cases for name, entry in case["implementations"].items()}
    return next((name for name, baseline in timed.items() if not baseline), None)


def ratios_of(case, name):
    """{baseline: spread of the ratio} of one implementation, {} where it was not timed."""
    return case["implementations"].get(name, {}).get("ratio_to", {})


def format_record(record):
    """Markdown: for each loss, the times, and what ours gains; below them the machine."""
    parts = []
    for loss, cases in losses_of(record).items():
        parts += [title(loss, cases), time_table(cases)]
        if ours_in(cases):
            parts.append(gain_table(cases))
        parts += notes(cases)
    parts.append(machine_line(record["machine"]))
    return "\n\n".join(parts)


def title(loss, cases):
    sizes = ", ".join(f"{name} = {value}" for name, value in list(cases[0]["sizes"].items())[1:])
    return f"**{loss}**, forward and backward, {sizes}, {cases[0]['dtype']}"


def time_table(cases):
    """Time of a step: median, and in brackets the quartiles."""
    names = names_of(cases)
    axis = next(iter(cases[0]["sizes"]))
    lines = []
    for case in cases:
        timed = case["implementations"]
        times = [format_time(timed[name]["step_seconds"]) if name in timed else "–" for name in names]
        lines.append([str(case["sizes"][axis]), *times])
    return markdown_table([axis, *[f"{name}, ms" for name in names]], lines)


def gain_table(cases):
    """What the fastest of ours gains: ratios to the baselines, its forward, its rate and its memory."""
    ours = ours_in(cases)
    axis = next(iter(cases[0]["sizes"]))
    baselines = [name for name in names_of(cases) if any(name in ratios_of(case, ours) for case in cases)]
    first = baselines[:1]
    with_bytes = cases[0]["bytes_moved"] is not None
    header = [axis, *[f"× {name}" for name in baselines], f"{ours}: forward, ms", "of product rate"]
    header += ["GB/s"] * with_bytes + ["extra memory, MB", *[f"{name}'s" for name in first]]
    lines = []
    for case in cases:
        entry = case["implementations"].get(ours)
        if entry is None:
            continue
        line = [str(case["sizes"][axis])]
        line += [format_ratio(entry["ratio_to"].get(name)) for name in baselines]
        line += [format_time(entry["forward_seconds"]), _format(entry["fraction_of_product"], ".2f")]
        line += [_format(entry["bytes_per_second"], ".1f", 1e-9)] * with_bytes
        line += [_format(entry["extra_bytes"], ".2f", 1e-6)]
        for name in first:
            line.append(_format(case["implementations"].get(name, {}).get("extra_bytes"), ".2f", 1e-6))
        lines.append(line)
    return markdown_table(header, lines)


def notes(cases):
    """What the columns mean, and what was left out."""
    product = cases[0]["product"]
    rates = sorted(case["product"]["operations_per_second"] / 1e9 for case in cases)
    lines = [
        "Median, quartiles in brackets. × is how many times as fast as each, within the same round."
        " Extra memory: beyond inputs and gradients."
        f" Product rate: a {product['size']}³ {product['dtype']} product in the same process,"
        f" {rates[0]:.0f} to {rates[-1]:.0f} GFLOP/s.",
    ]
    for case in cases:
        axis, size = next(iter(case["sizes"].items()))
        for name, reason in case["left_out"].items():
            lines.append(f"Left out at {axis} = {size}: {name}, {reason}.")
    return lines


def format_time(seconds):
    """Milliseconds with three significant digits: "4.21 [4.18, 4.30]"."""
    median, q1, q3 = (_three_digits(1e3 * seconds[key]) for key in ("median", "q1", "q3"))
    return f"{median} [{q1}, {q3}]"


def format_ratio(ratio):
    if ratio is None:
        return "–"
    median, q1, q3 = (_three_digits(ratio[key]) for key in ("median", "q1", "q3"))
    return f"**{median}** [{q1}, {q3}]"


def _three_digits(value):
    for digits, limit in ((3, 1), (2, 10), (1, 100)):
        if value < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"


def _format(value, spec, factor=1.0):
    return "–" if value is None else format(value * factor, spec)


def replaced_between(page, begin, end, made):
    """The text of a page with `made` in place of what stands between two marks, the second the next after the first."""
    before, rest = page.split(begin)
    _, after = rest.split(end, 1)
    return before + begin + made + end + after


def markdown_table(header, lines):
    """Cells padded to the width of their column, so that the table reads as plain text too."""
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    rows = [header, rule, *lines]
    padded = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)
