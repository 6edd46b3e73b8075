"""Packages as others would install them: a module, and metadata that declare what is in it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from goldenedit.editors import EDITORS
from goldenedit.layer_selection import SELECTORS


def restore_registries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is added to the registries from now on be gone after the test."""
    for registry in (EDITORS, SELECTORS):
        registry.names()  # the built-in records are there, and stay
        monkeypatch.setattr(registry, "_records", dict(registry._records))


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, source: str, entry_points: dict[str, dict[str, str]]
) -> None:
    """Put a package of one module on the path for the time of a test.

    Args:
        entry_points: By group, what each name stands for.
    """
    (folder / f"{module}.py").write_text(source)
    metadata = folder / f"{module}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in names.items())])
        for group, names in entry_points.items()
    ]
    (metadata / "entry_points.txt").write_text("\n".join(groups) + "\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setitem(sys.modules, module, None)  # so that it is gone after the test
    del sys.modules[module]
