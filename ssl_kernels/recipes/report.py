"""The report of an experiment: a table, figures, and the numbers as JSON."""

import dataclasses
import json
import os
import platform

import numpy as np
import torch

from ssl_kernels.recipes.drawing import EMBEDDED, add_legend, plane, pyplot, save, scatter
from ssl_kernels.recipes.evaluation import FEW_LABELS
from ssl_kernels.recipes.files import write_whole

FILES = ("loss.png", "embedding.png", "results.json")
COLORS = ("#b8b8b8", "#d1495b")  # the loss compared with, then ours
QUARTILES = (0.25, 0.5, 0.75)


def write_report(runs, labels, settings, machine, contention, out):
    """Write the FILES to the folder `out`; returns the text to print.

    Args:
        runs: From `experiment.run_experiment`: the untrained encoder comes right before the trained ones, and
            ours is the last of these.
        labels: Of the held-out images, (N,).
        contention: A `Contention` of the training.

    Raises:
        OSError: A file cannot be written; what was there before stays.
    """
    trained = [run for run in runs if run.history is not None]
    untrained = runs[-len(trained) - 1]
    loss, embedding, results = (out / name for name in FILES)
    draw_losses(trained, loss)
    draw_embeddings([untrained, trained[-1]], labels, embedding)
    write_results(runs, settings, machine, contention, results)
    gain = [format_gain(*trained)] if len(trained) == 2 else []
    busy = [contention.describe()] if contention.is_busy else []
    return "\n".join(["", format_table(runs), "", *gain, *busy, f"wrote {', '.join(FILES)} to {out}"])


def describe_machine(device):
    threads = f"{torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _cpu_name()
    return f"{name}, {threads}, torch {torch.__version__}"


def _cpu_name():
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def format_table(runs):
    """One line a run; a dash where there is no number. Times are the median step's, with quartiles in brackets."""
    accuracies = ("kNN", "linear probe", f"{FEW_LABELS} labels/class")
    header = ("", "loss", *accuracies, "loss, ms per step", "training, ms per step", "loss memory")
    return align_columns([header, *(_table_line(run) for run in runs)])


def align_columns(lines):
    """A table of rows of texts, of which the first is its head."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    first, *rest = (_align(line, widths) for line in lines)
    return "\n".join([first, "-" * len(first), *rest])


def _align(line, widths):
    cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
    cells[0] = line[0].ljust(widths[0])
    return "  ".join(cells)


def _table_line(run):
    accuracies = [f"{100 * value:.1f} %" for value in dataclasses.astuple(run.accuracy)]
    if run.history is None:
        return (run.name, "-", *accuracies, "-", "-", "-")
    return (
        run.name,
        f"{run.final_loss:.4f}",
        *accuracies,
        _milliseconds(run.history.loss_seconds),
        _milliseconds(run.history.step_seconds),
        "-" if run.peak_bytes is None else f"{run.peak_bytes / 1e6:.1f} MB",
    )


def _milliseconds(seconds):
    low, median, high = 1e3 * np.quantile(seconds, QUARTILES)
    return f"{median:.1f} ({low:.1f} to {high:.1f})"


def format_gain(plain, ours):
    """One sentence: what the loss of `ours` saved beside that of `plain`."""
    # Steps that ran one after the other are compared with each other: other work on the machine slows both.
    loss, training = (
        np.quantile(np.divide(getattr(plain.history, name), getattr(ours.history, name)), QUARTILES)
        for name in ("loss_seconds", "step_seconds")
    )
    memory = plain.peak_bytes / ours.peak_bytes
    return (
        f"{ours.name} against {plain.name}: loss {loss[1]:.1f} ({loss[0]:.1f} to {loss[2]:.1f}) times as fast in"
        f" 1/{memory:.1f} of the memory, training {training[1]:.2f} ({training[0]:.2f} to {training[2]:.2f}) times as"
        " fast (median of the steps and quartiles)"
    )


def draw_losses(trained, path):
    """Loss curves of the trained runs, and beside them what their loss cost."""
    figure, panels = pyplot.subplot_mosaic(
        [["curves", "time"], ["curves", "memory"]],
        figsize=(10, 4.4),
        width_ratios=(2.2, 1),
        layout="constrained",
    )
    colors = COLORS[-len(trained) :]
    for position, (run, color) in enumerate(zip(trained, colors, strict=True)):
        steps = np.arange(1, len(run.history.losses) + 1)
        # Equal curves hide each other: the first is drawn wide, the second thin on it.
        width = 5 if position < len(trained) - 1 else 1.4
        panels["curves"].plot(steps, run.history.losses, color=color, linewidth=width, label=run.name)
    panels["curves"].set(xlabel="step", ylabel="loss", title="Pretraining")
    panels["curves"].legend(frameon=False)

    names = [run.name for run in trained]
    milliseconds = [1e3 * float(np.median(run.history.loss_seconds)) for run in trained]
    _draw_bars(panels["time"], names, milliseconds, colors, "Time of the loss (ms per step)")
    if any(run.peak_bytes is None for run in trained):
        panels.pop("memory").remove()
    else:
        megabytes = [run.peak_bytes / 1e6 for run in trained]
        _draw_bars(panels["memory"], names, megabytes, colors, "Peak memory of the loss (MB)")
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _draw_bars(panel, names, values, colors, title):
    bars = panel.barh(names, values, color=colors, height=0.6)
    panel.bar_label(bars, fmt="%.1f", padding=3)
    panel.set_title(title, fontsize=10)
    panel.set_xlim(0, 1.2 * max(values))
    panel.invert_yaxis()
    panel.tick_params(left=False)


def draw_embeddings(runs, labels, path):
    """t-SNE maps of the held-out features of each of `runs`, coloured by class."""
    chosen = np.random.default_rng(0).permutation(len(labels))[:EMBEDDED]
    labels = labels.numpy()[chosen]
    size = (4.6 * len(runs) + 0.8, 4.6)
    figure, panels = pyplot.subplots(1, len(runs), figsize=size, layout="constrained", squeeze=False)
    for panel, run in zip(panels[0], runs, strict=True):
        points = plane(run.features.numpy()[chosen])
        scatter(panel, points, labels, f"{run.name}, kNN {100 * run.accuracy.knn:.1f} %")
    add_legend(figure, panels[0, 0])
    save(figure, path)


def write_results(runs, settings, machine, contention, path):
    """All numbers of the report, with the loss and the times of every step."""
    results = {
        "machine": machine,
        "contention": dataclasses.asdict(contention),
        "settings": settings.as_dict(),
        "runs": [],
    }
    for run in runs:
        entry = {"name": run.name, "accuracy": dataclasses.asdict(run.accuracy)}
        if run.history is not None:
            entry |= {
                "final_loss": run.final_loss,
                "loss_seconds_total": sum(run.history.loss_seconds),
                "seconds": run.history.seconds,
                "loss_peak_bytes": run.peak_bytes,
                **dataclasses.asdict(run.history),
            }
        results["runs"].append(entry)
    write_whole(path, (json.dumps(results, indent=1) + "\n").encode())
