"""`goldenedit cache`: what is in the cache on disk, and how to delete it."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.table import Table

from goldenedit.cache import MODELS, cache_dir, cache_entries, cache_limit, clean_cache
from goldenedit.commands.terminal import Report, console, reporting
from goldenedit.tables import printable
from goldenedit.units import size_of

_WHAT = {  # the kinds of results, in words
    "cells": "trial edits of sweeps",
    "key_statistics": "other text at the inputs of down projections",
    "layer_scores": "scores of layer selectors",
    "markers": "what markers of subjects start from",
    "mlp_moments": "other text at the inputs of MLPs",
    MODELS: "packaged models",
    "output_gradients": "gradients of the loss on other text",
    "spare_neurons": "neurons that are hardly used",
}

cache_app = typer.Typer(help="Show and delete results that are kept on disk.", no_args_is_help=True)


@cache_app.command("ls")
@reporting
def show() -> Report:
    """List what is kept on disk, by kind."""
    entries = cache_entries()
    table = Table("kind", "what it is", "results", "size", "last used")
    kinds: list[dict[str, object]] = []
    now = time.time()
    for kind in sorted({entry.kind for entry in entries}):
        of_kind = [entry for entry in entries if entry.kind == kind]
        days = (now - max(entry.used for entry in of_kind)) / 86_400
        table.add_row(
            kind, _WHAT.get(kind, ""), str(len(of_kind)), size_of(sum(entry.size for entry in of_kind)), _ago(days)
        )
        kinds.append({"kind": kind, "results": len(of_kind), "bytes": sum(entry.size for entry in of_kind)})
    console.print(table)
    most = cache_limit()
    limit = "" if most is None else f"Limit, beyond which old results but {MODELS} are deleted: {size_of(most)}"
    console.print(f"{printable(str(cache_dir()))}: {size_of(sum(entry.size for entry in entries))}")
    console.print(f"{limit or 'No limit'} (GOLDENEDIT_CACHE_LIMIT)")
    values = {"folder": str(cache_dir()), "limit_bytes": most, "kinds": kinds}
    return Report(values, [str(entry["kind"]) for entry in kinds])


@cache_app.command()
@reporting
def clean(
    kinds: Annotated[list[str] | None, typer.Argument(help="Kinds of results, as `ls` names them.")] = None,
    unused: Annotated[float, typer.Option(help="Delete only what was not used for so many days.")] = 0.0,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete everything without asking.")] = False,
) -> Report:
    """Delete results that are kept on disk. They are computed again when they are needed."""
    if not kinds and not unused and not yes:
        typer.confirm("Delete everything that is kept on disk?", abort=True, err=True)
    deleted = clean_cache(kinds or (), unused)
    size = sum(entry.size for entry in deleted)
    console.print(f"Deleted {len(deleted)} results, {size_of(size)}")
    return Report({"results": len(deleted), "bytes": size})


def _ago(days: float) -> str:
    if days < 1:
        return "today"
    return "yesterday" if days < 2 else f"{days:.0f} days ago"
