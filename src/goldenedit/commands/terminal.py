"""What the commands share: the console, how they tell their result, and how they load models and edits."""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from goldenedit.storage.connection import failing_at_once
from goldenedit.tables import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

console = Console(emoji=False)  # texts may have words between colons

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and everything else on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only what names the result, such as its folder.")]


@dataclass(frozen=True)
class Report:
    """The result of a command.

    Attributes:
        values: What `--json` prints.
        names: What `--quiet` prints, one on each line.
    """

    values: Any
    names: Sequence[object] = ()


def reporting(command: Callable[..., Report]) -> Callable[..., None]:
    """Give a command the options `--json` and `--quiet`.

    The command prints on the console what people read, and returns its result. Progress bars are shown on a terminal
    alone, and not with these options or NO_COLOR.
    """

    @functools.wraps(command)
    def run(*arguments: Any, as_json: bool, quiet: bool, **options: Any) -> None:
        with _printing(as_json, quiet), failing_at_once():
            report = command(*arguments, **options)
        if os.environ.get("RANK", "0") != "0":
            return  # another process of a launcher than the first
        if as_json:
            typer.echo(json.dumps(_finite(report.values), allow_nan=False))
        elif quiet:
            for name in report.names:
                typer.echo(str(name))

    signature = inspect.signature(command, eval_str=True)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
        for name, annotation in (("as_json", Json), ("quiet", Quiet))
    ]
    parameters = [*signature.parameters.values(), *added]
    run.__signature__ = signature.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _finite(value: Any) -> Any:
    """Return JSON values with null for numbers that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(entry) for name, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


@contextmanager
def _printing(as_json: bool, quiet: bool) -> Iterator[None]:
    """Print what people read on stderr if there is JSON on stdout, and nowhere if the command is to be quiet."""
    before = console.stderr, console.quiet
    console.stderr, console.quiet = as_json, quiet
    bars = sys.stderr.isatty() and not (as_json or quiet or os.environ.get("NO_COLOR"))
    try:
        if bars:
            yield
        else:
            with _without_bars():
                yield
    finally:
        console.stderr, console.quiet = before


@contextmanager
def _without_bars() -> Iterator[None]:
    """Switch off progress bars, those of libraries that are not imported yet too."""
    names = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS")
    before = {name: os.environ.get(name) for name in names}
    os.environ |= dict.fromkeys(names, "1")
    logging = sys.modules.get("transformers.utils.logging")
    was_active = logging is not None and logging.is_progress_bar_enabled()
    if logging is not None and was_active:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        if logging is not None and was_active:
            logging.enable_progress_bar()


@contextmanager
def telling() -> Iterator[None]:
    """Print a line when a phase begins that may take long, once for each kind of phase."""
    from goldenedit.cost import PHASES, announcing

    told: set[str] = set()

    def tell(phase: str) -> None:
        text = PHASES.get(phase)
        if text is not None and text not in told:
            told.add(text)
            console.print(f"{text} ...", style="dim")

    with announcing(tell):
        yield


def load_model(name: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, with a status line while loading."""
    with console.status(f"Loading {printable(name)}"):  # from before the imports, which take seconds
        from goldenedit import loading

        return loading.load_model(name, **options)


def load_together(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Load a model in each process of a launcher. The first process prints and writes; the others stay silent."""
    with console.status(f"Loading {printable(name)}"):
        from goldenedit import loading

        model, tokenizer, is_first = loading.load_together(name)
    console.quiet = console.quiet or not is_first
    return model, tokenizer, is_first


def load_edits(folder: str, model: str | None, **options: Any) -> tuple[Path, PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the folder of the edits, and load their base model at its recorded commit, or the model that is named."""
    from goldenedit import loading
    from goldenedit.storage.hub import find_folder
    from goldenedit.storage.reading import read_edit_folder

    path = find_folder(folder)
    name, revision = loading.base_of(read_edit_folder(path).base_model, model)
    return path, *load_model(name, revision=revision, **options)


def parse_layer(text: str) -> int | list[int] | str:
    """Parse a layer option: a word, a number, or numbers with commas between."""
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isdecimal() for number in numbers):
        return text
    return int(numbers[0]) if len(numbers) == 1 else [int(number) for number in numbers]
