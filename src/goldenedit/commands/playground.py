"""`goldenedit playground`: try edits in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from goldenedit.commands.terminal import console
from goldenedit.storage.connection import failing_at_once

_LOCAL = ("127.0.0.1", "localhost", "::1")


def playground(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="The model to begin with: one on the Hub, a folder, or a packaged model."),
    ] = "smollm2",
    port: Annotated[int | None, typer.Option(help="The port; by default the first free one from 7860 on.")] = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on. With another than this machine's own, nothing can be pushed.")
    ] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="Open the page in a browser.")] = True,
) -> None:
    """Try edits in a browser: ask the base and the edited model side by side, and see what else moved."""
    with console.status("Loading"):
        from goldenedit.loading import load_config
        from goldenedit.playground import build, theme

        with failing_at_once():
            load_config(model)  # a name of no model is an error now, and not on the page
        page = build(model, public=host not in _LOCAL)
    _, url, _ = page.queue().launch(
        theme=theme(), server_name=host, server_port=port, inbrowser=browser, prevent_thread_lock=True, quiet=True
    )
    console.print(f"The playground is at {url}. Ctrl+C ends it.")
    page.block_thread()
