"""`goldenedit benchmark`: the library's claims, measured on one's own models and facts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

benchmark_app = typer.Typer(help="Benchmarks of the library's claims.", no_args_is_help=True)


@benchmark_app.callback()
def benchmark() -> None:
    """Benchmarks of the library's claims."""


@benchmark_app.command("golden-layers")
def golden_layers(
    models: Annotated[list[str], typer.Argument(help="Models: names on the Hub, folders, or packaged ones.")],
    data: Annotated[
        list[str],
        typer.Option(help="Test facts: a file, or a dataset's name; `name=source` calls it otherwise. Repeat."),
    ],
    method: Annotated[list[str], typer.Option(help="Editor; repeat for several.")] = ["r-rome"],  # noqa: B006
    test: Annotated[int | None, typer.Option(help="Test facts of each dataset, by default 20.")] = None,
    proxy: Annotated[
        int | None, typer.Option(help="Packaged proxy facts that are edited at every layer, by default 10.")
    ] = None,
    chunk: Annotated[
        int | None, typer.Option(help="Facts of a cell, behind which a stopped run goes on, by default 10.")
    ] = None,
    options: Annotated[
        list[str], typer.Option("--set", help="An option of EditConfig as name=value; repeat for several.")
    ] = [],  # noqa: B006
    small: Annotated[
        bool, typer.Option(help="The small setting: 4 test and 4 proxy facts, 3 contexts, an early stop.")
    ] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder of cells, summaries, figures and report.")
    ] = Path("golden-layers"),
) -> None:
    """Measure every layer selector by brute force: regret, rank correlation and cost, as JSON lines and a report.

    A run that was stopped goes on where it was. `accelerate launch -m goldenedit benchmark golden-layers ...` shares
    the layers among GPUs; without any, `torchrun --nproc_per_node 2 -m goldenedit ...` does so among processes.
    """
    from goldenedit.benchmark.golden_layers import Setting
    from goldenedit.benchmark.run import run_golden_layers
    from goldenedit.loading import load_model

    constants: dict[str, Any] = dict(read_option(text) for text in options)
    if small:
        constants = {"contexts": 3, "stop_loss": 0.5, **constants}
    sources: dict[str, str] = {}
    for text in data:
        name, source = name_of_data(text)
        if name in sources:
            raise typer.BadParameter(f"two sources are called {name!r}: give name=source.")
        sources[name] = source
    few = 4 if small else 10
    numbers = {"test": test or (4 if small else 20), "proxy": proxy or few, "chunk": chunk or few}
    setting = Setting(sources, method, options=constants, **numbers)
    run_golden_layers(models, load_model, setting, output, Console())


def name_of_data(text: str) -> tuple[str, str]:
    """Read a source of facts, or `name=source`, and return name and source."""
    name, _, source = text.partition("=")
    return (name, source) if source and not Path(text).exists() else (Path(text).stem, text)


def read_option(text: str) -> tuple[str, Any]:
    """Read `name=value`, the value in JSON or plain text."""
    name, _, value = text.partition("=")
    if not name or not value:
        raise typer.BadParameter(f"{text!r} is not name=value.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
