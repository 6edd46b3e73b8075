"""`goldenedit chat`: ask the edited model, and compare it with its base model."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from goldenedit.commands.options import Base, Edits
from goldenedit.commands.terminal import Report, console, load_edits, reporting
from goldenedit.tables import printable

if TYPE_CHECKING:
    from goldenedit import EditModel

_HELP = "A line is a message. /new begins another conversation, and /quit ends."


@reporting
def chat(
    folder: Edits,
    model: Base = None,
    compare: Annotated[bool, typer.Option("--compare", help="Show what the base model answers too.")] = False,
    complete: Annotated[
        bool, typer.Option("--complete", help="Continue each line as plain text, without the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="A system message for each conversation.")] = None,
    tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer.")] = 100,
) -> Report:
    """Ask the model with the edits in FOLDER.

    Each line of the input is a message of one conversation, until the line /new begins another. Decodes greedily. With
    --compare, each model has a conversation of its own.
    """
    from goldenedit import EditModel

    path, base, tokenizer = load_edits(folder, model)
    complete = complete or not tokenizer.chat_template
    if complete and system is not None:
        raise typer.BadParameter("--system needs a chat template, which --complete and base models go without.")
    edit_model = EditModel.from_pretrained(base, path, tokenizer=tokenizer)
    is_asked = sys.stdin.isatty()
    if is_asked:
        console.print(_HELP)
    beginning = [] if system is None else [{"role": "system", "content": system}]
    models = ["base", "edited"] if compare else ["edited"]
    turns: list[dict[str, str]] = []
    conversations: dict[str, list[dict[str, str]]] = {name: list(beginning) for name in models}
    while (line := _line(is_asked)) is not None and line != "/quit":
        if line == "/new":
            conversations = {name: list(beginning) for name in models}
        elif line:
            if not is_asked:
                console.print(f"[bold]>[/bold] {printable(line)}")
            turn = {"prompt": line}
            for name, messages in conversations.items():
                messages.append({"role": "user", "content": line})
                with edit_model.disable_adapter() if name == "base" else nullcontext():
                    turn[name] = _answer(edit_model, line if complete else messages, tokens)
                messages.append({"role": "assistant", "content": turn[name]})
                label = f"[bold]{name} model:[/bold] " if compare else ""
                console.print(f"{label}{printable(turn[name])}")
            turns.append(turn)
    return Report(turns, [turn["edited"] for turn in turns])


def _line(is_asked: bool) -> str | None:
    """Return the next line of the input without the space around it; None after the last one."""
    if is_asked:
        console.print("[bold]>[/bold] ", end="")
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(model: EditModel, asked: str | list[dict[str, str]], tokens: int) -> str:
    """Return what a model writes after a text or a conversation."""
    from goldenedit.lm.chat import conversation
    from goldenedit.lm.decoding import greedy

    text = asked if isinstance(asked, str) else conversation(model.tokenizer, asked)
    return greedy(model.lm, [text], tokens)[0].text.strip()
