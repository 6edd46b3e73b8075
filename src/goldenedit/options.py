"""Options of the command line that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FactsFormat = Annotated[
    str,
    typer.Option("--format", help="The format of the facts, such as `mquake`; `auto` tells it by their fields."),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out facts that cannot be read, and warn how many there are.")
]
Model = Annotated[str, typer.Argument(help="A model on the Hub, a folder, or a packaged model: `smollm2` or `gemma3`.")]
Layer = Annotated[
    str,
    typer.Option(
        help="A layer selector (such as `lga` or `auto`), `hub:REPO`, a layer number, or numbers with commas between.",
    ),
]
Edits = Annotated[str, typer.Argument(help="An edit folder, or a repository on the Hub.")]
Base = Annotated[str | None, typer.Option(help="The base model, if it cannot be loaded by its recorded name.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", file_okay=False, help="The folder to save the edit in.")]
