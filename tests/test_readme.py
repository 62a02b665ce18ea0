"""README.md and docs/: their Python runs, and the make targets and files that they name exist."""

import contextlib
import io
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def code_blocks(page, language):
    """(line, code) of each fenced block of one language; indented fences are dedented."""
    found = []
    fence = re.compile(rf"^( *)```{language}\s*?\n(.*?)^\1```\s*$", re.MULTILINE | re.DOTALL)
    text = page.read_text()
    for match in fence.finditer(text):
        indent = len(match.group(1))
        code = "\n".join(line[indent:] for line in match.group(2).splitlines())
        found.append((text.count("\n", 0, match.start()) + 2, code))
    return found


def session_source(code):
    """The statements of a block, which may be written as an interactive session."""
    if not re.search(r"^>>> ", code, re.MULTILINE):
        return code
    return "\n".join(line[4:] for line in code.splitlines() if line.startswith((">>> ", "... ")))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    """Blocks of a page build on one another, as a reader types them."""
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__page__"}
    for line, code in code_blocks(page, "python"):
        source = "\n" * (line - 1) + session_source(code)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, str(page), "exec"), namespace)


def test_readme_shows_the_loss():
    code = "\n".join(code for _, code in code_blocks(ROOT / "README.md", "python"))
    assert "nt_xent_loss" in code or "NTXentLoss" in code


def test_docstring_of_the_package_runs():
    import ssl_kernels

    exec(session_source(ssl_kernels.__doc__), {})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_targets_exist(page):
    text = page.read_text()
    # In backticks, in a fenced or indented block, or after another command; prose that says "make sure" is none.
    fenced = "\n".join(
        block for language in ("", "sh", "bash", "console") for _, block in code_blocks(page, language)
    )
    named = set(re.findall(r"(?:`|^ {4,}|^\t)(?:\$ )?make ([a-z][\w-]*)", text, re.MULTILINE))
    named |= set(re.findall(r"(?:^|[;&$]) *make ([a-z][\w-]*)", fenced, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    targets = {
        name for line in re.findall(r"^([\w .-]+?)\s*:(?!=)", makefile, re.MULTILINE) for name in line.split()
    }
    assert named <= targets
    if page.name == "README.md":
        assert {"demo", "test"} <= named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), target
