"""Options of the command line that several commands have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

FactsFormat = Annotated[
    str,
    typer.Option("--format", help="The format of the facts, such as `mquake`; `auto` tells it by their fields."),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out facts that cannot be read, and warn how many there are.")
]
Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A model on the Hub, a folder, or a packaged model: `smollm2` or `gemma3`."),
]
Layer = Annotated[
    str,
    typer.Option(
        help="A layer selector (such as `lga` or `auto`), `hub:REPO`, a layer number, or numbers with commas between.",
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="An option of EditConfig, such as `steps=20`. May be repeated."),
]
Edits = Annotated[str, typer.Argument(metavar="FOLDER", help="An edit folder, or a repository on the Hub.")]
Base = Annotated[str | None, typer.Option(help="The base model, if it cannot be loaded by its recorded name.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", file_okay=False, help="The folder to save the edit in.")]


def read_option(text: str) -> tuple[str, Any]:
    """Parse `name=value`, whose value is JSON or plain text."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise typer.BadParameter(f"{text!r} is not name=value.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def settings_of(given: Mapping[str, Any], more: Sequence[str] | None) -> dict[str, Any]:
    """Return options of EditConfig by name: those that the command has options for, and those of `--set`.

    Raises:
        typer.BadParameter: An option is unknown, or the command has an option of its own for it.
    """
    from dataclasses import fields

    from goldenedit.config import EditConfig
    from goldenedit.registry import meant

    named = dict(map(read_option, more or ()))
    known = [entry.name for entry in fields(EditConfig) if entry.init]
    for name in named:
        if name in given:
            raise typer.BadParameter(f"--set {name}=... is --{name} ... here.")
        if name not in known:
            hint = meant(name, known) or " `goldenedit editors` lists those of each editor."
            raise typer.BadParameter(f"EditConfig has no option {name!r}.{hint}")
    return {**given, **named}
