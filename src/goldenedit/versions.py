"""Versions of the libraries that edits depend on."""

from __future__ import annotations

import importlib.metadata


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that edits depend on."""
    names = ("goldenedit", "transformers", "peft", "torch")
    return {name: importlib.metadata.version(name) for name in names}
