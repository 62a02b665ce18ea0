"""Copies of the Triton kernels, broken at one place, for tests that say whether a check notices."""

import importlib
from pathlib import Path

from tests import sites

SOURCES = Path(__file__).resolve().parents[2] / "ssl_kernels" / "triton"


def load(folder, operation, file, old, new, at=""):
    """The kernels of an operation from copies of its file and those shared by all, with a mutation of one of them.

    `old` becomes `new`, where `tests.sites` finds it; `folder` must be on Python's path.
    """
    suffix = folder.name.replace("-", "_")
    kernels = [path.stem for path in SOURCES.glob(f"{operation}_[fb]wd.py")]
    shared_names = ("common", "launch", "panels", "permutation_walk", "samples", *kernels)
    for name in (*shared_names, operation):
        text = (SOURCES / f"{name}.py").read_text()
        if name == file:
            text = sites.replaced(text, old, new, at)
        for shared in shared_names:
            text = text.replace(f"ssl_kernels.triton.{shared} ", f"{shared}_{suffix} ")
            text = text.replace(
                f"from ssl_kernels.triton import {shared}\n", f"import {shared}_{suffix} as {shared}\n"
            )
        (folder / f"{name}_{suffix}.py").write_text(text)
    return importlib.import_module(f"{operation}_{suffix}")
