"""Adapters against the published formulas, always, and against the libraries themselves where they are installed."""

import warnings

import pytest
import torch
from hypothesis import given, settings

from benchmarks.peers import Originals
from benchmarks.results import replaced_between
from ssl_kernels.adapters import LIBRARIES
from tests.adapters import table
from tests.adapters.uses import (
    TOLERANCES,
    Case,
    adapter,
    all_uses,
    cases,
    formulas,
    largest_error,
    results,
)
from tests.helpers import run_python

USES = all_uses()


def check(use, space, case):
    found, expected = results(use, adapter(use.library), case), results(use, space, case)
    assert largest_error(found, expected) <= (use.tolerance or TOLERANCES[use.dtype or case.dtype])


@pytest.mark.parametrize("use", [use for use in USES if use.formula], ids=str)
@settings(max_examples=6)
@given(case=cases())
def test_the_published_formula(use, case):
    check(use, formulas(use.library), case)


@pytest.mark.parametrize("use", [use for use in USES if use.peer], ids=str)
@settings(max_examples=20)
@given(case=cases())
def test_the_library_itself(use, case):
    try:
        space = Originals(use.library)
    except ImportError as error:
        pytest.skip(f"the library is not installed (make test-peers installs all): {error}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library
        check(use, space, case)


def test_every_class_has_a_use():
    named = {(use.library, use.name) for use in USES}
    for library in LIBRARIES:
        assert {name for of, name in named if of == library} == set(adapter(library).__all__)
        assert set(adapter(library).ORIGINALS) in (set(adapter(library).__all__), set())


def test_uses_can_fail():
    """A wrong temperature is noticed in the value and in the gradients."""
    use = next(use for use in USES if use.name == "NTXentLoss")
    case = {"n": 6, "d": 8, "dtype": torch.float64, "seed": 0}
    right, wrong = (results(use, adapter(use.library), Case(**case, temperature=t)) for t in (0.5, 0.501))
    assert largest_error((wrong[0], []), (right[0], [])) > 1e-4
    assert largest_error(([], wrong[1]), ([], right[1])) > 1e-4


def test_the_page_has_the_table_of_these_classes():
    """`python -m tests.adapters.table` writes it."""
    page = table.PAGE.read_text()
    figures = table.kept_figures(page)
    assert replaced_between(page, table.BEGIN, table.END, table.table(figures)) == page
    assert all(
        any(figures[use.library, use.name]) for use in USES if use.peer and adapter(use.library).ORIGINALS
    )


def test_an_adapter_does_not_import_its_library():
    code = "\n".join(f"import ssl_kernels.adapters.{library}" for library in LIBRARIES)
    names = {name.partition(".")[0] for library in LIBRARIES for name in adapter(library).ORIGINALS.values()}
    found = run_python(f"{code}\nimport sys\nprint(sorted(set(sys.modules) & {names}))")
    assert found.strip() == "[]"
