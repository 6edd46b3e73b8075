"""Measure how the code is put together: long signatures and files, unused parameters, import cycles.

The files are parsed with `ast` and not imported. A unit is a folder below the package, or a module that
lies in the package itself. Imports inside functions count for cycles like others and are marked. Imports under
`if TYPE_CHECKING` are listed but do not count.

    python structure.py
    python structure.py --json --source FOLDER/src/goldenedit
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

from import_graph import Function, cycles, imports_of, modules_of, unit, unit_imports  # noqa: E402

MOST_PARAMETERS = 6
MOST_LINES = 400
# Names by which protocols and hooks of others are recognized: who implements them does not choose what they are given.
_GIVEN = {"module", "args", "kwargs", "output", "cls", "self"}


@dataclass(frozen=True)
class Parameters:
    """A function and how many parameters it has, or one of them that it does not use."""

    place: str
    function: str
    count: int = 0
    unused: str = ""


def functions(source: Path) -> Iterator[tuple[str, str, Function, bool]]:
    """Yield place, qualified name, node and whether it is a method of each function of a package."""

    def within(node: ast.AST, prefix: str, place: str, in_class: bool) -> Iterator[tuple[str, str, Function, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Function):
                yield f"{place}:{child.lineno}", prefix + child.name, child, in_class
                yield from within(child, f"{prefix}{child.name}.", place, False)
            elif isinstance(child, ast.ClassDef):
                yield from within(child, f"{prefix}{child.name}.", place, True)
            else:
                yield from within(child, prefix, place, in_class)

    for path in sorted(source.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        yield from within(tree, "", str(path.relative_to(source)), False)


def _parameters(function: Function, method: bool) -> list[ast.arg]:
    signature = function.args
    named = [*signature.posonlyargs, *signature.args]
    static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in function.decorator_list)
    if method and not static:
        named = named[1:]
    variadic = [one for one in (signature.vararg, signature.kwarg) if one is not None]
    return [*named, *signature.kwonlyargs, *variadic]


def long_signatures(source: Path) -> list[Parameters]:
    """Return the functions with more than `MOST_PARAMETERS` parameters, self and cls not counted; the longest first."""
    counted = [
        Parameters(place, name, len(_parameters(function, method)))
        for place, name, function, method in functions(source)
    ]
    long = [one for one in counted if one.count > MOST_PARAMETERS]
    return sorted(long, key=lambda one: (-one.count, one.place))


def unused_parameters(source: Path) -> list[Parameters]:
    """Return the parameters that a function's body does not use, except in stubs and where a protocol requires them."""
    unused = []
    for place, name, function, method in functions(source):
        if _is_stub(function):
            continue
        names = {node.id for statement in function.body for node in ast.walk(statement) if isinstance(node, ast.Name)}
        unused += [
            Parameters(place, name, unused=parameter.arg)
            for parameter in _parameters(function, method)
            if parameter.arg not in names | _GIVEN and not parameter.arg.startswith("_")
        ]
    return unused


def _is_stub(function: Function) -> bool:
    """Return whether a body consists of a docstring, `...`, `pass` or a raise."""
    return all(
        isinstance(node, ast.Pass | ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
        for node in function.body
    )


def long_files(source: Path) -> dict[str, int]:
    """Return the files of more than `MOST_LINES` lines, with their lines."""
    lines = {
        str(path.relative_to(source)): len(path.read_text(encoding="utf-8").splitlines())
        for path in sorted(source.rglob("*.py"))
    }
    return {name: count for name, count in lines.items() if count > MOST_LINES}


def measured(source: Path) -> dict[str, Any]:
    """Return all figures as JSON values."""
    modules = modules_of(source)
    every = [edge for edge in imports_of(source) if edge.imported in modules]
    edges = [edge for edge in every if edge.kind != "typing"]
    units = unit_imports(edges)
    files: dict[str, set[str]] = {}
    for edge in edges:
        files.setdefault(edge.importer, set()).add(edge.imported)
    return {
        "long_signatures": [asdict(one) for one in long_signatures(source)],
        "unused_parameters": [asdict(one) for one in unused_parameters(source)],
        "long_files": long_files(source),
        "units": {name: sorted(targets) for name, targets in sorted(units.items())},
        "cycles_of_units": cycles(units),
        "cycles_of_files": cycles(files),
        "imports_in_functions": [asdict(edge) for edge in every if edge.kind == "function"],
        "imports_for_typing": [asdict(edge) for edge in every if edge.kind == "typing"],
    }


TITLES = {
    "long_signatures": f"functions with {MOST_PARAMETERS + 1} parameters or more",
    "unused_parameters": "parameters that are never used",
    "long_files": f"files over {MOST_LINES} lines",
    "cycles_of_units": "import cycles of units",
    "cycles_of_files": "import cycles of files",
    "imports_in_functions": "imports inside functions",
    "imports_for_typing": "imports for typing alone",
    "units": "units that import others",
}


def report(figures: dict[str, Any]) -> str:
    """Return the figures as text: a table of counts, then the details of each."""
    lines = ["| measured | count |", "|---|---|"]
    lines += [f"| {title} | {len(figures[name])} |" for name, title in TITLES.items()]
    late = {(edge["importer"], edge["imported"]) for edge in figures["imports_in_functions"]}
    rows = {
        "long_signatures": [
            f"{one['count']:3}  {one['place']} {one['function']}" for one in figures["long_signatures"]
        ],
        "unused_parameters": [
            f"{one['place']} {one['function']}: {one['unused']}" for one in figures["unused_parameters"]
        ],
        "long_files": [f"{count:5}  {name}" for name, count in figures["long_files"].items()],
        "cycles_of_units": _cycle_rows(figures["cycles_of_units"], {(unit(start), unit(end)) for start, end in late}),
        "cycles_of_files": _cycle_rows(figures["cycles_of_files"], late),
        "units": [f"{name} -> {', '.join(targets)}" for name, targets in figures["units"].items()],
        **{
            name: [f"{edge['importer']}:{edge['line']} -> {edge['imported']}" for edge in figures[name]]
            for name in ("imports_in_functions", "imports_for_typing")
        },
    }
    for name, title in TITLES.items():
        if rows[name]:
            lines += ["", f"{title}:", *(f"  {row}" for row in rows[name])]
    return "\n".join(lines)


def _cycle_rows(groups: Iterable[list[str]], late: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each cycle, with those of its imports that lie inside functions."""
    rows = []
    for group in groups:
        marked = sorted(f"{start} -> {end}" for start, end in late if start != end and {start, end} <= set(group))
        rows.append(", ".join(group) + (f" (inside functions: {'; '.join(marked)})" if marked else ""))
    return rows


def main() -> None:
    """Print the figures of the package beside this folder, or of another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    package = ROOT / "src" / "goldenedit"
    parser.add_argument("--source", type=Path, default=package, help="folder of the package")
    parser.add_argument("--json", action="store_true", help="print JSON")
    arguments = parser.parse_args()
    figures = measured(arguments.source.resolve())
    print(json.dumps(figures, indent=1) if arguments.json else report(figures))


if __name__ == "__main__":
    main()
