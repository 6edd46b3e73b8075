"""Pages that are written from the code: one for each editor and each layer selector, and the command line."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from goldenedit.cli import commands
from goldenedit.editors import EDITORS
from goldenedit.editors.options import default_of
from goldenedit.layer_selection import SELECTORS


def write(folder: Path) -> None:
    """Write all pages into a folder; those of parts that are gone are deleted."""
    pages = dict(pages_of_editors()) | dict(pages_of_selectors()) | {"command-line.md": command_line()}
    folder.mkdir(exist_ok=True)
    for path in folder.glob("*.md"):
        if path.name not in pages:
            path.unlink()
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def pages_of_editors() -> Iterator[tuple[str, str]]:
    """Yield the names and texts of the pages of editors."""
    for editor in EDITORS.available():
        module = editor.function.__module__
        rows = [
            [
                f"`{name}`",
                f"`{default_of(entry, True)}`",
                f"`{default_of(entry, False)}`",
                entry.metadata.get("help", ""),
            ]
            for name, entry in editor.fields.items()
        ]
        parts = [
            f"# {editor.name}",
            f"`EditConfig(method={editor.name!r})`" + (f" ({editor.paper})" if editor.paper else ""),
            prose(editor.function),
            f"Learns {editor.learns}." + (f" Reads {', '.join(sorted(editor.reads))}." if editor.reads else ""),
            "## Where it comes from",
            prose(sys.modules[module]),
            *(["## Options", table(["option", "default", "as published", ""], rows)] if rows else []),
            f"The formula is in `{module.replace('.', '/')}.py`. [Which editor to use](../editors.md) has the figures.",
        ]
        yield f"editor-{editor.name}.md", page(parts)


def pages_of_selectors() -> Iterator[tuple[str, str]]:
    """Yield the names and texts of the pages of layer selectors."""
    for selector in SELECTORS.available():
        module = selector.function.__module__
        cost = "Scores every layer" if selector.is_scored else "Returns layers without scores"
        parts = [
            f"# {selector.name}",
            f"`EditConfig(layer={selector.name!r})`" + (f" ({selector.paper})" if selector.paper else ""),
            prose(selector.function),
            cost
            + (", on facts" if selector.needs_facts else "")
            + (", without outliers" if selector.fence else "")
            + (", shared by the processes of a launcher" if selector.is_shared else "")
            + ".",
            "## How",
            prose(sys.modules[module]),
            "[Golden layers](../benchmarks.md) has the figures.",
        ]
        yield f"selector-{selector.name}.md", page(parts)


def command_line() -> str:
    """Return the page of all commands, with their options."""
    parts = [
        "# Command line",
        "`goldenedit COMMAND --help` shows this too. Exit codes: 0 done, 1 an error with its remedy, 2 wrong options.",
    ]
    for name, command in commands():
        arguments = " ".join(p.name.upper() for p in command.params if p.param_type_name == "argument")
        rows = [
            [
                ", ".join(f"`{option}`" for option in (*parameter.opts, *parameter.secondary_opts)),
                "" if parameter.default is None or parameter.default is False else f"`{parameter.default}`",
                parameter.help or "",
            ]
            for parameter in command.params
            if parameter.name != "help"
        ]
        parts += [f"## goldenedit {name}", f"`goldenedit {name} {arguments} [OPTIONS]`", command.help or ""]
        parts.append(table(["", "default", ""], rows))
    return page(parts)


def prose(thing: Any) -> str:
    """Return the docstring of a function or module, which is Markdown, without its sections."""
    return re.split(r"\n(?:Args|Raises|Returns|Example):\n", inspect.getdoc(thing) or "")[0].strip()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(parts: Sequence[str]) -> str:
    """Return a page of parts."""
    return "\n\n".join(parts) + "\n"
