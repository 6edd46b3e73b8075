"""`goldenedit search`: edits that others share on the Hub."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from goldenedit.commands.terminal import Report, console, reporting
from goldenedit.tables import printable


@reporting
def search(
    query: Annotated[str | None, typer.Argument(metavar="QUERY", help="A part of the names of repositories.")] = None,
    base: Annotated[str | None, typer.Option(help="The model that is edited, such as `google/gemma-3-270m`.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="The largest number of repositories.")] = 20,
) -> Report:
    """Find edits on the Hub, those that are downloaded most first."""
    from goldenedit.editors import EDITORS
    from goldenedit.storage.hub import search_edits

    with console.status("Asking the Hub"):
        found = search_edits(query, base, limit)
    if not found:
        console.print("No edits were found.")
        return Report([])
    known = EDITORS.names()
    values = []
    table = Table("repository", "base model", "editor", "downloads")
    for repository in found:
        tags = repository.tags or []
        bases = [tag.rpartition(":")[2] for tag in tags if tag.startswith("base_model:")]
        editors = [tag for tag in tags if tag in known]
        base_model, downloads = bases[0] if bases else None, repository.downloads or 0
        values.append({"id": repository.id, "base_model": base_model, "editors": editors, "downloads": downloads})
        table.add_row(*map(printable, (repository.id, base_model or "", ", ".join(editors), str(downloads))))
    console.print(table)
    return Report(values, [repository.id for repository in found])
