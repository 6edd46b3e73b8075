"""Options of the command line that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

FactsFormat = Annotated[
    str,
    typer.Option("--format", help="The format of the facts, such as `mquake`; `auto` tells it by their fields."),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Leave out facts that cannot be read, and warn how many there are.")
]
