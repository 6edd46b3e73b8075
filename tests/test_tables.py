"""The tables that the command line prints."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from goldenedit import EditRequest
from goldenedit.storage.folder import Edit, EditedFact
from goldenedit.tables import facts_table, printable


def printed(content: object) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(content)
    return console.file.getvalue()


@pytest.mark.parametrize("control", ["\x1b]0;title\x07", "\x1b[2J", "\r", "\b", "\u202e", "\u2066", "\x9b", "\ud800"])
def test_control_characters_of_a_fact_do_not_reach_the_terminal(control):
    fact = EditedFact(EditRequest("The Louvre is in", "The Louvre", f"Rome{control}[red]!"), 0.1, 0.9, 1)
    output = printed(facts_table([Edit("edit_1", [fact], {})]))
    assert not set(control) & set("\x1b\x07\r\b\u202e\u2066\x9b\ud800") & set(output)
    assert "Rome\ufffd" in output
    assert "[red]!" in output


@pytest.mark.parametrize("text", ["two\nlines", "नक्‍षा", "می‌خواهم", "👩‍👩‍👧", "[bold]Köln[/bold]", "a\\b"])
def test_text_of_every_script_is_printed_verbatim(text):
    assert printed(printable(text)) == f"{text}\n"
