"""The site of `make docs`: pages of this folder, docstrings of the package."""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ssl_kernels  # noqa: E402

project = "ssl_kernels"
version = release = ssl_kernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"ssl_kernels {release}"
html_copy_source = False

default_role = "code"  # docstrings write `name`, as Markdown does
myst_heading_anchors = 3
autodoc_inherit_docstrings = False  # forward of a module without a docstring would show nn.Module's
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
maximum_signature_line_length = 100
napoleon_numpy_docstring = False
linkcheck_timeout = 20


def literal_blocks(app, what, name, obj, options, lines):
    """Marks an indented block that follows a paragraph as literal: formulas and code, where reStructuredText quotes.

    The entries of a section such as `Args:` are indented too, without an empty line before them.
    """
    for i in range(2, len(lines)):
        text = lines[i - 2].rstrip()
        if lines[i - 1].strip() or not text or not lines[i].strip():
            continue
        if _indent(lines[i]) > _indent(text) and not re.match(r"\s*(\w+:|[-*] .*)$", text):
            lines[i - 2] = re.sub(r":*$", "", text) + (" ::" if not text.endswith(":") else "::")


def _indent(line):
    return len(line) - len(line.lstrip())


def setup(app):
    app.connect("autodoc-process-docstring", literal_blocks, priority=100)  # before napoleon's
