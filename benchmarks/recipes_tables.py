"""The tables of docs/recipes.md, from what `benchmarks.recipes` has stored."""

import statistics

from ssl_kernels.recipes.files import write_whole
from ssl_kernels.recipes.methods import METHODS

BEGIN = "<!-- {} of python -m benchmarks.recipes -->\n"
END = "<!-- end -->\n"


def write(page, store):
    """Put the tables between their marks in the file `page`."""
    text = page.read_text()
    tables = {
        "accuracies": accuracies(store),
        "fine-tuning": fine_tuning(store),
        "mixing": mixing(store),
    }
    for name, table in tables.items():
        begin = BEGIN.format(name)
        before, rest = text.split(begin)
        _, after = rest.split(END, 1)
        text = f"{before}{begin}\n{table}\n\n{END}{after}"
    write_whole(page, text.encode())


def found(store, kind, method=None):
    """The results of all seeds of a run, such as ("ours", "simclr")."""
    name = kind if method is None else f"{kind} {method}"
    return [run for key, run in store["runs"].items() if key.rsplit(" ", 1)[0] == name]


def describe(values):
    """Mean, standard deviation where there are several, and their number, in percent."""
    if not values:
        return "–"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread} ({len(values)})"


def accuracies(store):
    """Frozen features: pixels, untrained encoders, every method and the same in plain PyTorch."""
    lines = [
        "| | kNN | linear probe | 5 labels per class | effective rank | plain PyTorch, kNN |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in ("raw pixels", "convolutional network", "transformer"):
        runs = [run[name] for run in found(store, "untouched")]
        if name != "raw pixels":
            name = f"untrained {name}"
        lines.append(row(name, runs, "", ""))
    for method in METHODS:
        runs = found(store, "ours", method)
        if runs:
            rank = f"{statistics.fmean(run['rank'] for run in runs):.1f}"
            plain = [run["knn"] for run in found(store, "plain", method)]
            lines.append(row(f"`{method}`", runs, rank, describe(plain) if plain else ""))
    return "\n".join(lines)


def row(name, runs, *more):
    cells = [describe([run[kind] for run in runs]) for kind in ("knn", "linear", "few")]
    return f"| {' | '.join([name, *cells, *more])} |"


def fine_tuning(store):
    """Trained further on a part of the labels, beside training from scratch."""
    from benchmarks.recipes import FINETUNED, PARTS

    lines = [
        f"| | {' | '.join(f'{100 * part:g} % of labels' for part in PARTS)} |",
        "|---" + "|---:" * len(PARTS) + "|",
    ]
    networks = {"from scratch": [run["convolutional network"] for run in found(store, "untouched")]}
    networks |= {f"from `{method}`": found(store, "ours", method) for method in FINETUNED}
    for name, runs in networks.items():
        cells = [describe([run["finetuned"][at] for run in runs]) for at in range(len(PARTS))]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def mixing(store):
    """Supervised training with mixed images beside training without."""
    from benchmarks.recipes import MIXED

    lines = ["| | accuracy | calibration error | accuracy under noise |", "|---|---:|---:|---:|"]
    for method in MIXED:
        runs = found(store, "ours", method)
        cells = [describe([run[kind] for run in runs]) for kind in ("accuracy", "calibration", "noisy")]
        lines.append(f"| {' | '.join([f'`{method}`', *cells])} |")
    return "\n".join(lines)
