"""The tables of docs/recipes.md, from what `benchmarks.recipes` has stored."""

import statistics

from benchmarks import recipes
from benchmarks.results import replaced_between
from ssl_kernels.recipes.files import write_whole
from ssl_kernels.recipes.methods import METHODS

BEGIN = "<!-- {} of python -m benchmarks.recipes -->\n"
END = "<!-- end -->\n"
FEATURES = ["kNN", "linear probe", "5 labels per class"]
PARTS = [f"fine-tuned, {100 * part:g} % of labels" for part in recipes.PARTS.values()]


def write(page, lines):
    """Put the tables between their marks in the file `page`."""
    text = page.read_text()
    for name, make in TABLES.items():
        text = replaced_between(text, BEGIN.format(name), END, f"\n{make(lines)}\n\n")
    write_whole(page, text.encode())


def accuracies(lines):
    """Frozen features: pixels, untrained encoders, every method and the same in plain PyTorch; below it whose seconds
    these are."""
    rows = []
    for name in ("raw pixels", "convolutional network", "transformer"):
        title = name if name == "raw pixels" else f"untrained {name}"
        rows.append([title, *cells(lines, "untrained", name, recipes.FEATURES), "", "", "", "", ""])
    machine = machine_of(lines)
    for method in METHODS:
        ranks = [float(line["rank"]) for line in runs(lines, "ours", method)]
        rank = f"{statistics.fmean(ranks):.1f}" if ranks else "–"
        ours = cells(lines, "ours", method, recipes.FEATURES)
        plain = ["the same"] * 3
        if method in recipes.PLAIN:
            plain = cells(lines, "plain", method, ("knn", "linear"))
            plain.append(seconds(lines, "plain", method, machine))
        rows.append([f"`{method}`", *ours, rank, seconds(lines, "ours", method, machine), *plain])
    head = [*FEATURES, "effective rank", "seconds", "plain PyTorch: kNN", "linear probe", "seconds"]
    return f"{table(head, rows)}\n\nSeconds of one core of this processor: {machine or '–'}."


def fine_tuning(lines):
    """Trained further on a part of the labels, beside training from scratch."""
    rows = [["from scratch", *cells(lines, "untrained", "convolutional network", recipes.PARTS)]]
    rows += [
        [f"from `{method}`", *cells(lines, "ours", method, recipes.PARTS)] for method in recipes.FINETUNED
    ]
    return table(PARTS, rows)


def transfer(lines):
    """SimCLR's encoder of either image set, judged on either."""
    kinds = ("knn", "linear", "few", *recipes.PARTS)
    rows = [
        [
            "digits, untrained (fine-tuned: from scratch)",
            *cells(lines, "untrained", "convolutional network", kinds),
        ],
        ["digits, trained on digits", *cells(lines, "ours", "simclr", kinds)],
        ["digits, trained on mnist5k", *cells(lines, "on digits", "from mnist5k", kinds)],
        ["mnist5k, untrained (fine-tuned: from scratch)", *cells(lines, "on mnist5k", "untrained", kinds)],
        ["mnist5k, trained on mnist5k", *cells(lines, "on mnist5k", "from mnist5k", kinds)],
        ["mnist5k, trained on digits", *cells(lines, "on mnist5k", "from digits", kinds)],
    ]
    return table([*FEATURES, *PARTS], rows)


def mixing(lines):
    """Supervised training with mixed images beside training without."""
    rows = [[f"`{method}`", *cells(lines, "ours", method, recipes.CLASSIFIER)] for method in recipes.MIXED]
    return table(["accuracy", "calibration error", "accuracy under noise"], rows)


def machine_of(lines):
    """The processor that most of the trainings ran on, the only one whose times are shown."""
    machines = [line["machine"] for line in lines if "machine" in line]
    return statistics.mode(machines) if machines else None


def seconds(lines, run, name, machine):
    """The least of the trainings on that processor: what else it did there only adds to them."""
    taken = [float(line["seconds"]) for line in runs(lines, run, name) if line.get("machine") == machine]
    return f"{min(taken):.0f}" if taken else "–"


def runs(lines, run, name):
    """The lines of all seeds."""
    return [line for line in lines if (line["run"], line["name"]) == (run, name)]


def cells(lines, run, name, columns):
    """Of each column the mean over the seeds and, of several, the standard deviation, in percent."""
    of_run = runs(lines, run, name)
    return [describe([float(line[column]) for line in of_run if column in line]) for column in columns]


def describe(values):
    """With the number of seeds in brackets where some are missing."""
    if not values:
        return "–"
    text = f"{100 * statistics.fmean(values):.1f}"
    if len(values) > 1:
        text += f" ± {100 * statistics.stdev(values):.1f}"
    return text if len(values) == len(recipes.SEEDS) else f"{text} ({len(values)})"


def table(head, rows):
    """Markdown, the first column without a title."""
    lines = [["", *head], ["---", *["---:"] * len(head)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


TABLES = {"accuracies": accuracies, "fine-tuning": fine_tuning, "transfer": transfer, "mixing": mixing}
