"""Curves over the batch size: time of a step, and how many times as fast ours is."""

import textwrap
from itertools import cycle

import matplotlib

from benchmarks.machine import machine_line
from benchmarks.results import losses_of, names_of, ours_in, ratios_of, title

matplotlib.use("Agg")  # needs no display
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, NullLocator

BASELINE_STYLES = (("#6c757d", "o"), ("#c9a227", "s"), ("#4c78a8", "D"), ("#59a14f", "v"))
OUR_STYLES = (("#d1495b", "o"), ("#e8a0a8", "s"), ("#8d3b72", "D"))
LONGEST_LINE = 140
MOST_LOSSES = 16  # of a figure that can still be looked at


def draw_record(record, stem):
    """Write `stem`.png with a line of panels for each loss of `record` that was timed at several sizes.

    Returns:
        Its path, or None where there is no such loss or more of them than one figure can show.
    """
    losses = {loss: cases for loss, cases in losses_of(record).items() if len(cases) > 1}
    if not 1 <= len(losses) <= MOST_LOSSES:
        return None
    figure = pyplot.figure(figsize=(11, 4.4 * len(losses) + 0.4), layout="constrained")
    lines = figure.subfigures(len(losses), squeeze=False)[:, 0]
    for line, (loss, cases) in zip(lines, losses.items(), strict=True):
        draw_cases(line, loss, cases)
    figure.supxlabel(
        textwrap.fill(machine_line(record["machine"]), LONGEST_LINE), fontsize=8, color="#6c757d"
    )
    path = stem.with_name(f"{stem.name}.png")
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return path


def draw_cases(figure, loss, cases):
    """Times to the left, ratios to the right; bands are the quartiles."""
    times, ratios = figure.subplots(1, 2)
    axis = next(iter(cases[0]["sizes"]))
    styles = choose_styles(cases)
    ours = ours_in(cases)
    for name in names_of(cases):
        timed = [case for case in cases if name in case["implementations"]]
        sizes = [case["sizes"][axis] for case in timed]
        steps = [case["implementations"][name]["step_seconds"] for case in timed]
        draw_band(times, sizes, steps, 1e3, name, styles[name], emphasised=name == ours)
    times.set(ylabel="milliseconds per step", title="Time")

    gains, sizes_of = {}, {}
    for name in names_of(cases):
        compared = [case for case in cases if name in ratios_of(case, ours)]
        if compared:
            sizes = [case["sizes"][axis] for case in compared]
            gains[name] = [ratios_of(case, ours)[name] for case in compared]
            draw_band(ratios, sizes, gains[name], 1, name, styles[name])
            sizes_of[name] = sizes
    # Numbers on the outermost curves only: between close ones they would cover each other.
    by_height = sorted(gains, key=lambda name: gains[name][-1]["median"])
    for name, offset in zip(by_height[:1] + by_height[1:][-1:], (-13, 6), strict=False):
        label_points(ratios, sizes_of[name], gains[name], styles[name], offset)
    ratios.axhline(1, color=OUR_STYLES[0][0], linewidth=1.4)
    ratios.set(ylabel="times as fast", title=f"{ours} against each" if ours else "")

    for panel, base in ((times, 10), (ratios, 2)):
        finish_panel(panel, axis, [case["sizes"][axis] for case in cases], base)
    times.legend(frameon=False, fontsize=9)
    figure.suptitle(title(loss, cases).replace("*", ""), fontsize=12)


def choose_styles(cases):
    """{name: (colour, marker)}: one family of colours for the baselines, another for ours."""
    families = {True: cycle(BASELINE_STYLES), False: cycle(OUR_STYLES)}
    baseline = {name: entry["baseline"] for case in cases for name, entry in case["implementations"].items()}
    return {name: next(families[baseline[name]]) for name in names_of(cases)}


def draw_band(panel, sizes, spreads, factor, name, style, emphasised=False):
    """The line of medians in a band of quartiles."""
    color, marker = style
    low, middle, high = ([factor * one[key] for one in spreads] for key in ("q1", "median", "q3"))
    width = 2.6 if emphasised else 1.5
    panel.plot(sizes, middle, color=color, marker=marker, markersize=5, linewidth=width, label=name)
    panel.fill_between(sizes, low, high, color=color, alpha=0.25, linewidth=0)


def label_points(panel, sizes, spreads, style, offset):
    """The medians above or below their points, `offset` points away."""
    for size, one in zip(sizes, spreads, strict=True):
        panel.annotate(
            f"{one['median']:.1f}",
            (size, one["median"]),
            (0, offset),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=style[0],
        )


def finish_panel(panel, axis, sizes, base):
    """Logarithmic axes with plain numbers; `base` is that of the vertical one."""
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=base)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.xaxis.set_minor_locator(NullLocator())
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_xlabel(axis)
    panel.grid(axis="y", color="#e5e7eb", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
