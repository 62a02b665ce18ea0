"""Figures of what was learned: curves, maps, similarities and spectra."""

import io

import matplotlib
import numpy as np
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from ssl_kernels.recipes.files import write_whole

matplotlib.use("Agg")  # needs no display
from matplotlib import pyplot

EMBEDDED = 2000  # held-out images drawn at most
LARGEST_LEGEND = 10


def save(figure, path):
    """Write the figure as PNG, whole or not at all."""
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png")
    pyplot.close(figure)
    write_whole(path, content.getvalue())


def draw_curves(history, name, path):
    """Loss by step, and by epoch how far apart and in how many directions the embeddings lie."""
    figure, panels = pyplot.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    panels[0].plot(np.arange(1, len(history.losses) + 1), history.losses, linewidth=1, color="#d1495b")
    panels[0].set(xlabel="step", ylabel="loss", title=name)
    epochs = np.arange(1, len(history.spreads) + 1)
    panels[1].plot(epochs, history.spreads, marker=".", color="#30638e")
    panels[1].set(xlabel="epoch", title="spread of the embeddings", ylim=(0, None))
    panels[2].plot(epochs, history.ranks, marker=".", color="#30638e")
    panels[2].set(xlabel="epoch", title="effective rank of the embeddings", ylim=(0, None))
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_map(features, labels, kind, title, path):
    """Features (N, F) in the plane, coloured by class."""
    figure, panel = pyplot.subplots(figsize=(5.4, 4.6), layout="constrained")
    chosen = np.random.default_rng(0).permutation(len(labels))[:EMBEDDED]
    scatter(panel, plane(features.numpy()[chosen], kind), labels.numpy()[chosen], title)
    add_legend(figure, panel)
    save(figure, path)


def plane(rows, kind="tsne"):
    """Rows (N, F) as points (N, 2), by t-SNE of their cosines or by their first principal components."""
    if kind == "pca":
        return PCA(2).fit_transform(rows)
    perplexity = min(30, (len(rows) - 1) / 3)
    return TSNE(metric="cosine", init="pca", perplexity=perplexity, random_state=0).fit_transform(rows)


def scatter(panel, points, labels, title):
    classes = np.unique(labels)
    few = len(classes) <= LARGEST_LEGEND
    colormap = pyplot.get_cmap("tab10" if few else "nipy_spectral")
    for rank, label in enumerate(classes):
        color = colormap(rank if few else rank / len(classes))
        panel.scatter(*points[labels == label].T, s=12, color=color, linewidths=0, label=str(label))
    panel.set(title=title, xticks=[], yticks=[])
    panel.spines[:].set_visible(False)


def add_legend(figure, panel):
    handles, names = panel.get_legend_handles_labels()
    if len(names) <= LARGEST_LEGEND:
        figure.legend(handles, names, loc="outside right center", frameon=False, title="class", markerscale=2)


def draw_similarities(positive, negative, path):
    """Histograms of cosines."""
    figure, panel = pyplot.subplots(figsize=(5.4, 3.4), layout="constrained")
    bins = np.linspace(-1, 1, 81)
    for values, name, color in (
        (negative, "different images", "#b8b8b8"),
        (positive, "two views of one image", "#d1495b"),
    ):
        panel.hist(values.numpy(), bins, density=True, color=color, alpha=0.7, label=name)
    panel.set(xlabel="cosine", ylabel="density")
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def draw_spectrum(spectrum, path):
    """Eigenvalues, largest first, on a logarithmic scale."""
    figure, panel = pyplot.subplots(figsize=(5.4, 3.4), layout="constrained")
    values = np.maximum(spectrum.numpy(), 1e-12)
    panel.semilogy(np.arange(1, len(values) + 1), values, color="#30638e")
    panel.set(xlabel="direction", ylabel="variance", title="covariance of the embeddings")
    panel.spines[["top", "right"]].set_visible(False)
    save(figure, path)
