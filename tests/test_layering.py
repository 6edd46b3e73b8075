"""The package is read in one direction: a unit imports itself and units before it, never one after it.

A unit is a folder below the package, or a module that lies in the package itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

from import_graph import Import, cycles, imports_of, modules_of, unit, unit_imports

SOURCE = Path(__file__).resolve().parents[1] / "src" / "goldenedit"
ORDER = (
    "html",
    "threads",
    "units",
    "registry",
    "records",
    "precision",
    "cache",
    "packaged",
    "formats",
    "devices",
    "parallel",
    "cost",
    "writing",
    "questions",
    "rephrasing",
    "subjects",
    "texts",
    "requests",
    "data",
    "editors",
    "layer_scores",
    "config",
    "architecture",
    "storage",
    "lm",
    "chat",
    "evaluation",
    "subject_questions",
    "editing",
    "layer_selection",
    "planning",
    "plans",
    "adapters",
    "versions",
    "sequences",
    "storing",
    "sharing",
    "measuring",
    "wrapping",
    "model",
    "audit_neurons",
    "audit",
    "audit_suspects",
    "plots",
    "tables",
    "loading",
    "benchmark",
    "__init__",  # hands out the public names, which only what starts the program takes from there
    "demo",
    "playground",
    "commands",
    "cli",
    "__main__",
)


def imports_at_run_time(source: Path) -> list[Import]:
    """Return the imports between files of a package, those inside functions too, without those for typing alone."""
    modules = modules_of(source)
    return [edge for edge in imports_of(source) if edge.kind != "typing" and edge.imported in modules]


def file_cycles(edges: list[Import]) -> list[list[str]]:
    """Return the files that import each other."""
    graph: dict[str, set[str]] = {}
    for edge in edges:
        graph.setdefault(edge.importer, set()).add(edge.imported)
    return cycles(graph)


def upward(edges: list[Import], order: tuple[str, ...]) -> list[str]:
    """Return the imports of units that come later in the order."""
    place = {name: index for index, name in enumerate(order)}
    known = [edge for edge in edges if {unit(edge.importer), unit(edge.imported)} <= place.keys()]
    return [str(edge) for edge in known if place[unit(edge.imported)] > place[unit(edge.importer)]]


def test_every_unit_has_its_place_in_the_order():
    assert {unit(name) for name in modules_of(SOURCE)} <= set(ORDER)


def test_no_unit_imports_one_that_comes_later():
    imports = upward(imports_at_run_time(SOURCE), ORDER)
    assert not imports, "\n".join(["These import what comes later in ORDER:", *imports])


def test_no_files_import_each_other_in_a_circle():
    assert file_cycles(imports_at_run_time(SOURCE)) == []


def test_no_units_import_each_other_in_a_circle():
    assert cycles(unit_imports(imports_at_run_time(SOURCE))) == []


def test_editors_import_torch_and_their_registry_alone():
    allowed = {"torch", "goldenedit.registry", *sys.stdlib_module_names}
    foreign = [
        str(edge)
        for edge in imports_of(SOURCE)
        if unit(edge.importer) == "editors"
        and edge.kind != "typing"
        and edge.imported not in allowed
        and unit(edge.imported) != "editors"
    ]
    assert not foreign, "\n".join(["Editors import torch, goldenedit.registry and each other:", *foreign])


def written(folder: Path, files: dict[str, str]) -> Path:
    """Write a package and return its folder."""
    for name, text in {"__init__.py": "", **files}.items():
        path = folder / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "made"


def test_a_circle_is_found_whatever_its_imports_look_like(tmp_path):
    source = written(
        tmp_path,
        {
            "low/__init__.py": "from made.low.maths import add",
            "low/maths.py": "import torch\ndef add():\n    with torch.no_grad():\n        from made import high",
            "high.py": "class A:\n    from .low import maths",
            "top.py": "import made.high as high, made.low.maths",
        },
    )
    edges = imports_at_run_time(source)
    assert [str(edge) for edge in edges] == [
        "made.high:2 -> made.low.maths",
        "made.low:1 -> made.low.maths",
        "made.low.maths:4 -> made.high (inside a function)",
        "made.top:1 -> made.high",
        "made.top:1 -> made.low.maths",
    ]
    assert file_cycles(edges) == [["made.high", "made.low.maths"]]
    assert cycles(unit_imports(edges)) == [["high", "low"]]
    assert upward(edges, ("low", "high", "top")) == ["made.low.maths:4 -> made.high (inside a function)"]
    assert Import("made.low.maths", "torch", 1, "module") in imports_of(source)


def test_imports_for_typing_make_no_circle(tmp_path):
    typed = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from made.high import A\nelse:\n    A = None"
    source = written(tmp_path, {"low/__init__.py": "", "low/maths.py": typed, "high.py": "from made.low import maths"})
    assert [str(edge) for edge in imports_at_run_time(source)] == ["made.high:1 -> made.low.maths"]
    assert Import("made.low.maths", "made.high", 3, "typing") in imports_of(source)


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by these names alone."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names))
