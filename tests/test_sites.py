"""Mutations go where the text says, however it is laid out, and nowhere else."""

import pytest

from tests import sites

TEXT = """
float sum(const float* x) { if (i >= n) return; barrier();
  return x[i]; }
float largest(const float* x) {
  if (i >=
      n) return;
  barrier();
}
"""


def test_the_text_may_be_laid_out_otherwise():
    begin, end = TEXT.index("if (i >= n)"), TEXT.index(" }")
    assert (
        sites.replaced(TEXT, "if (i>=n) return; barrier(); return x[i];", " {} ")
        == TEXT[:begin] + "{}" + TEXT[end:]
    )


def test_of_several_the_first_from_a_place_on():
    start, end = sites.find(TEXT, "if (i >= n) return;", at="largest(")
    assert (
        TEXT[:start].endswith("largest(const float* x) {\n  ")
        and TEXT[start:end].split("\n")[1] == "      n) return;"
    )


@pytest.mark.parametrize(
    "old, at", [("barrier();", ""), ("fence();", ""), ("barrier();", "float"), ("i > n", "sum(")]
)
def test_what_is_not_there_once_is_refused(old, at):
    with pytest.raises(ValueError, match=r"is there [024] times"):
        sites.find(TEXT, old, at)


def test_words_are_not_joined():
    with pytest.raises(ValueError, match="0 times"):
        sites.find("returnx;", "return x;")


@pytest.mark.parametrize(
    "text, new, changed",
    [("a < b && c < d", "a < b", "&& c < d"), ("sum +  x", "sum - x", "+"), ("f(a)", "", "f(a)")],
)
def test_what_changes(text, new, changed):
    start, end = sites.changed(text, (0, len(text)), new)
    assert text[start:end] == changed
