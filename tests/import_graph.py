"""Which file of a package imports which, read with `ast`: nothing of the package is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One import of a file.

    Attributes:
        importer: The importing module, by its dotted name.
        imported: The imported module: a file of the package, or the top-level name of another package.
        line: Line of the statement.
        kind: `module`; `function`, which runs when the function does; or `typing`, which never runs.
    """

    importer: str
    imported: str
    line: int
    kind: str

    def __str__(self) -> str:
        inside = {"function": " (inside a function)", "typing": " (for typing alone)"}.get(self.kind, "")
        return f"{self.importer}:{self.line} -> {self.imported}{inside}"


def modules_of(source: Path) -> dict[str, Path]:
    """Return the files of a package by their dotted names, those of folders by the folder's."""
    names = {path: (source.name, *path.relative_to(source).with_suffix("").parts) for path in source.rglob("*.py")}
    return {".".join(names[path]).removesuffix(".__init__"): path for path in sorted(names)}


def imports_of(source: Path) -> list[Import]:
    """Return every import of every file of a package."""
    modules = modules_of(source)
    found: dict[Import, None] = {}
    for name, path in modules.items():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        for node, kind in _statements(ast.parse(path.read_text(encoding="utf-8")), "module"):
            for target in _targets(node, package):
                imported = _nearest(target, modules)
                if imported != name:
                    found[Import(name, imported, node.lineno, kind)] = None
    return list(found)


def _statements(tree: ast.AST, kind: str) -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, kind
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            yield from _statements(ast.Module(node.body, []), "typing")
            yield from _statements(ast.Module(node.orelse, []), kind)
        else:
            yield from _statements(node, "function" if isinstance(node, Function) and kind == "module" else kind)


def _targets(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    parts = package.split(".")
    base = [*parts[: len(parts) - node.level + 1]] if node.level else []
    module = ".".join([*base, *([node.module] if node.module else [])])
    return [f"{module}.{alias.name}" for alias in node.names]  # a file of that folder, or a name in that file


def _nearest(target: str, modules: dict[str, Path]) -> str:
    """Return the longest beginning of a dotted name that is a file of the package, else its first part."""
    name = target
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or target.partition(".")[0]


def unit(module: str) -> str:
    """Return the folder below the package that a module lies in, or its own name where it lies in the package."""
    return (*module.split("."), "__init__")[1]


def unit_imports(edges: Iterable[Import]) -> dict[str, set[str]]:
    """Return the units that each unit imports, itself left out."""
    units: dict[str, set[str]] = {}
    for edge in edges:
        if unit(edge.importer) != unit(edge.imported):
            units.setdefault(unit(edge.importer), set()).add(unit(edge.imported))
    return units


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of names that all reach each other (strongly connected, two or more), sorted."""
    reached = {name: _reachable(graph, name) for name in graph}
    groups = {
        tuple(sorted(other for other in names if name in reached.get(other, ())))
        for name, names in reached.items()
        if name in names
    }
    return [list(group) for group in sorted(groups)]


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    names: set[str] = set()
    waiting = [start]
    while waiting:
        new = graph.get(waiting.pop(), set()) - names
        names |= new
        waiting += new
    return names
