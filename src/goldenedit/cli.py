"""The command line, `goldenedit`: from the golden layer to an edit that is measured and shared."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console

from goldenedit import __version__
from goldenedit.commands.benchmark import benchmark_app
from goldenedit.commands.cache import cache_app
from goldenedit.commands.chat import chat
from goldenedit.commands.demo import demo
from goldenedit.commands.edit import edit
from goldenedit.commands.evaluate import compare, evaluate
from goldenedit.commands.locate import locate
from goldenedit.commands.plan import plan
from goldenedit.commands.playground import playground
from goldenedit.commands.search import search
from goldenedit.commands.share import export, push
from goldenedit.commands.show import editors, show
from goldenedit.platforms import print_anything
from goldenedit.tables import printable

app = typer.Typer(
    help="Edit facts in causal language models: find the golden layer, edit, and save the edit as a LoRA adapter.",
    epilog="Exit codes: 0 done, 1 an error with its remedy, 2 wrong options.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (locate, edit, chat, evaluate, compare, show, push, search, export, editors, plan, playground, demo):
    app.command()(_command)
app.add_typer(benchmark_app, name="benchmark")
app.add_typer(cache_app, name="cache")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"goldenedit {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def commands(group: Any = None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield all commands by the words that call them, those of groups too."""
    root: Any = group or typer.main.get_command(app)
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line. Errors that the user can fix end with one line and exit code 1."""
    print_anything(sys.stdout, sys.stderr)
    try:
        return app(arguments)
    except (ValueError, OSError, KeyError, ModuleNotFoundError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        Console(stderr=True, emoji=False).print(f"[bold red]Error:[/bold red] {printable(str(message))}")
        sys.exit(1)


if __name__ == "__main__":
    main()
