"""Sphinx's config of the documentation: `make docs` writes static pages to build/docs, without a network."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from goldenedit import __version__

sys.path.insert(0, str(Path(__file__).parent))  # for the pages that are written from the code

project = "goldenedit"
author = "the goldenedit authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_title = f"goldenedit {__version__}"
html_show_copyright = False
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = True
suppress_warnings = ["misc.highlighting_failure"]  # CSV has no lexer

_PAGES = {"benchmarks/README.md": "benchmarks.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}


def _to_pages(app: Any, name: str, source: list[str]) -> None:
    """Turn links to files of the repository into links to pages of them, or into plain text where there is none."""
    depth = name.count("/")

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if target in _PAGES:
            return f"[{text}]({'../' * depth}{_PAGES[target]}{anchor})"
        if target == "README.md":
            return f"[{text}]({'../' * depth}get-started.md)"
        return text

    up = re.escape("../" * (depth + 1))
    source[0] = re.sub(rf"\[([^\]]*)\]\({up}([^)#]*)(#[^)]*)?\)", link, source[0])


def _of_included(app: Any, path: Any, parent: str, source: list[str]) -> None:
    """Make links of an included file of the repository plain text."""
    source[0] = re.sub(r"\[([^\]]*)\]\((?!https?:|#)[^)]*\)", r"\1", source[0])


def _examples(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Turn the Markdown of docstrings into reST: code in single backquotes, and fences around examples."""
    text = re.sub(r"^( *)```(?:python|text)?$", r"\1", "\n".join(lines), flags=re.MULTILINE)
    lines[:] = re.sub(r"(?<![`:])`([^`\n]+)`(?![`_])", r"``\1``", text).splitlines()


def setup(app: Any) -> None:
    """Write the generated pages, and follow links out of this folder."""
    import generated

    generated.write(Path(__file__).parent / "generated")
    app.connect("source-read", _to_pages)
    app.connect("include-read", _of_included)
    app.connect("autodoc-process-docstring", _examples, priority=400)
