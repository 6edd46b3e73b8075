"""What the commands of the command line share: the console, and how they load models and edits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from goldenedit.tables import printable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

console = Console(emoji=False)  # texts may have words between colons


def report_on_stderr(context: typer.Context) -> None:
    """Print everything on stderr until the running command ends, so that stdout is for its result alone."""
    console.stderr = True
    context.call_on_close(lambda: setattr(console, "stderr", False))


def load_model(name: str, **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer, with a status line while loading."""
    from goldenedit import loading

    with console.status(f"Loading {printable(name)}"):
        return loading.load_model(name, **options)


def load_together(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, bool]:
    """Load a model in each process of a launcher. The first process prints and writes; the others stay silent."""
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
