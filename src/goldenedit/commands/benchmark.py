"""`goldenedit benchmark`: measure the library's claims on your own models and facts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from goldenedit.commands.options import FactsFormat, SkipBad, read_option
from goldenedit.commands.terminal import Report, console, reporting

benchmark_app = typer.Typer(help="Measure the library's claims on your own models and facts.", no_args_is_help=True)


@benchmark_app.callback()
def benchmark() -> None:
    """Measure the library's claims on your own models and facts."""


@benchmark_app.command("golden-layers")
@reporting
def golden_layers(
    models: Annotated[
        list[str], typer.Argument(metavar="MODELS...", help="Models on the Hub, folders, or packaged models.")
    ],
    data: Annotated[
        list[str],
        typer.Option(help="Test facts: a file or a dataset, as `source` or as `name=source`. Can be repeated."),
    ],
    format: FactsFormat = "auto",
    skip_bad: SkipBad = False,
    method: Annotated[
        list[str],
        typer.Option(
            help="An editor, as `name`, or as `name=count` to edit only so many facts of each set. Can be repeated."
        ),
    ] = ["gated", "locft"],  # noqa: B006
    test: Annotated[int | None, typer.Option(help="The number of test facts from each set; 64 by default.")] = None,
    chunk: Annotated[
        int, typer.Option(help="The number of facts of a round, which are edited at all layers before the next ones.")
    ] = 16,
    layers: Annotated[
        int | None,
        typer.Option(help="The number of evenly spaced layers to edit, beside those of selectors; all by default."),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="The minutes that each model may take. Fewer facts, and then fewer layers, are edited to keep it."
        ),
    ] = None,
    options: Annotated[
        list[str], typer.Option("--set", help="An option of EditConfig, as name=value. Can be repeated.")
    ] = [],  # noqa: B006
    small: Annotated[bool, typer.Option(help="A quick run: 4 test facts, 3 contexts, an early stop.")] = False,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder for results, figures and the report.")
    ] = Path("golden-layers"),
) -> Report:
    """Edit test facts at every layer, and compare what every layer selector chooses, as JSON lines and a report.

    What the run will take is told before the edits are made. A stopped run resumes where it stopped. `accelerate launch
    -m goldenedit benchmark golden-layers ...` splits the layers among GPUs; on a machine without GPUs, `torchrun
    --nproc_per_node 2 -m goldenedit ...` splits them among processes.
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
            raise typer.BadParameter(f"two sources have the name {name!r}. Name them, as name=source.")
        sources[name] = source
    counts = list(map(_editor_and_count, method))
    if len(methods := dict(counts)) < len(counts):
        raise typer.BadParameter(f"--method names an editor twice: {', '.join(method)}. Name each once.")
    count = (4 if small else 64) if test is None else test
    setting = Setting(
        sources,
        methods,
        count,
        chunk=chunk,
        grid=layers,
        budget=budget,
        options=constants,
        format=format,
        skip_bad=skip_bad,
    )
    run_golden_layers(models, load_model, setting, output, console)
    return Report({"output": str(output)}, [output])


def name_of_data(text: str) -> tuple[str, str]:
    """Parse `name=source`, or a source alone, and return the name and the source."""
    name, _, source = text.partition("=")
    return (name, source) if source and not Path(text).exists() else (Path(text).stem, text)


def _editor_and_count(text: str) -> tuple[str, int | None]:
    """Parse `name` or `name=count`."""
    name, separator, count = text.partition("=")
    if separator and not (count.isdecimal() and int(count)):
        raise typer.BadParameter(f"{text!r} has no number of facts behind the =. Write, for example, {name}=32.")
    return name, int(count) if count else None
