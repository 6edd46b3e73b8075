"""Public formats of facts. Each module tells whether a record is in its format, and reads it as fields of requests.

A new format is a new module with a `FORMAT`, listed in `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goldenedit.formats import (
    counterfact,
    flat,
    hallueditbench,
    knowedit,
    mquake,
    plain,
    qaedit,
    rippleedits,
    uniedit,
    wikibigedit,
    zsre,
)
from goldenedit.formats.fields import Format, Pair
from goldenedit.registry import meant

__all__ = ["FORMATS", "Format", "Pair", "format_named", "format_of"]

# A record may match several: the first of these counts, so those with more telling fields come first.
FORMATS = (
    mquake.FORMAT,
    counterfact.FORMAT,
    rippleedits.FORMAT,
    uniedit.FORMAT,
    wikibigedit.FORMAT,
    zsre.FORMAT,
    hallueditbench.FORMAT,
    qaedit.FORMAT,
    knowedit.FORMAT,
    flat.FORMAT,
    plain.FORMAT,
)


def format_of(record: Any) -> Format | None:
    """Return the format of a record, told by its fields; None if no format is known to have such fields."""
    if not isinstance(record, Mapping):
        return None
    return next((known for known in FORMATS if known.matches(record)), None)


def format_named(name: str) -> Format:
    """Return the format with a name.

    Raises:
        ValueError: There is no format of this name.
    """
    for known in FORMATS:
        if known.name == name:
            return known
    names = ["auto", *(known.name for known in FORMATS)]
    raise ValueError(f"The format {name!r} is unknown.{meant(name, names)} The formats are {names}.")
