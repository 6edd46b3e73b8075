"""`goldenedit demo`: one edit of a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from goldenedit.commands.terminal import Report, console, reporting, telling


@reporting
def demo(
    model: Annotated[str, typer.Option(help="A packaged model, a model on the Hub, or a folder.")] = "smollm2",
    output: Annotated[
        Path, typer.Option("--output", "-o", file_okay=False, help="The folder to save the edit in.")
    ] = Path("eiffel-in-rome"),
) -> Report:
    """Try it on a real model: find the golden layer, move the Eiffel Tower to Rome, save, and load with PEFT alone."""
    from goldenedit.storage.atomic import check_writable

    check_writable(output)
    with console.status("Loading"):
        from goldenedit.demo import run_demo

    with telling():
        return Report(run_demo(model, output, console), [output])
