"""Writes the table of docs/migration.md: `python -m tests.adapters.table [LIBRARY ...]`, where they are installed.

Every use runs with its library and with its adapter on the same random inputs; the largest difference is shown.
"""

import pathlib
import random
import sys

import torch

from benchmarks.peers import Originals
from benchmarks.results import replaced_between
from tests.adapters.uses import Case, adapter, all_uses, largest_error, results

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "migration.md"
BEGIN, END = "<!-- written by tests/adapters/table.py -->\n", "<!-- end -->\n"
COMPARISONS = 40


def differences(use, space):
    """The largest difference of results and gradients over random cases, by dtype."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        if use.dtype in (None, dtype):
            draw = random.Random(0)
            errors = []
            for seed in range(COMPARISONS):
                temperature = draw.choice((0.05, 0.1, 0.5, 2.0))
                case = Case(draw.randint(2, 32), draw.randint(2, 64), temperature, dtype, seed)
                mine, theirs = results(use, adapter(use.library), case), results(use, space, case)
                errors.append(largest_error(mine, theirs))
            found[dtype] = max(errors)
    return found


def shown(error):
    return "" if error is None else "none" if error == 0 else f"{error:.0e}"


def kept_figures(text):
    """{(library, name): (float32, float64)} as the page has them between its marks."""
    lines = text.split(BEGIN)[1].split(END)[0].splitlines()
    rows = (line.strip("| \n").split(" | ") for line in lines if line.startswith("| `"))
    return {tuple(row[0].strip("`").split(".", 1)): tuple(cell.strip() for cell in row[1:3]) for row in rows}


def table(figures):
    """The lines, with (float32, float64) figures by (library, name)."""
    lines = ["| class | float32 | float64 | otherwise than the original |", "|---|---|---|---|"]
    seen = {}
    for use in all_uses():
        seen.setdefault((use.library, use.name), []).append(use)
    for library, name in seen:
        narrow, wide = figures.get((library, name), ("", ""))
        otherwise = adapter(library).DIFFERENCES.get(name, "–")
        lines.append(f"| `{library}.{name}` | {narrow} | {wide} | {otherwise} |")
    return "\n".join(lines) + "\n"


def main(libraries=()):
    page = PAGE.read_text()
    figures, spaces, missing = kept_figures(page), {}, set()
    measured = {}
    for use in all_uses():
        if libraries and use.library not in libraries:
            continue
        try:
            space = spaces.setdefault(use.library, None) or Originals(use.library)
        except ImportError:
            missing.add(use.library)
            continue
        spaces[use.library] = space
        if use.peer:
            found = differences(use, space)
            key = (use.library, use.name)
            for dtype, error in found.items():
                measured[key, dtype] = max(error, measured.get((key, dtype), 0.0))
            narrow, wide = (measured.get((key, dtype)) for dtype in (torch.float32, torch.float64))
            figures[key] = (shown(narrow), shown(wide))
    PAGE.write_text(replaced_between(page, BEGIN, END, table(figures)))
    print(
        f"wrote {PAGE}" + (f"; not installed, figures kept: {', '.join(sorted(missing))}" if missing else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
