"""Measure operations against what people use today: print tables, store them with the machine, draw curves.

The measurements are in the folder benchmarks/ of the repository: beside this package in a clone, absent from a wheel.
"""

import importlib
import pathlib
import sys

import ssl_kernels

REPOSITORY = pathlib.Path(ssl_kernels.__file__).resolve().parent.parent


def add_arguments(parser):
    """The options of `python -m benchmarks`."""
    _benchmarks(parser).add_arguments(parser)


def run(args, parser):
    """Measure what `args` ask for; the exit code, 1 if an implementation was refused."""
    return _benchmarks(parser).run(args, parser)


def _benchmarks(parser):
    if not (REPOSITORY / "benchmarks" / "__main__.py").exists():
        parser.error(
            f"it needs the repository's folder benchmarks/, and there is none in {REPOSITORY}:"
            " run it in a clone, after `make test`, as `python -m ssl_kernels bench`"
        )
    if sys.path[0] != str(REPOSITORY):  # before a folder benchmarks/ that lies where the user is
        sys.path.insert(0, str(REPOSITORY))
    return importlib.import_module("benchmarks.__main__")
