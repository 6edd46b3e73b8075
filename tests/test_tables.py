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


@pytest.mark.parametrize(
    ("before", "after", "weakest", "shown"),
    [
        (0.060, 0.027, 0.027, "does not take: less likely than before"),
        (0.010, 0.3, 0.2, "does not take: still unlikely"),
        (0.010, 0.71, 0.12, "does not take: one token of the answer is unlikely"),
        (0.010, 0.71, 0.6, None),
        (0.9, 0.8, 0.8, None),
        (0.010, 0.71, None, None),
    ],
)
def test_a_fact_that_does_not_take_says_why(before, after, weakest, shown):
    fact = EditedFact(EditRequest("The Louvre is in", "The Louvre", "Rome"), before, after, 1, weakest)
    output = printed(facts_table([Edit("edit_1", [fact], {})]))
    assert fact.takes == (shown is None)
    assert (shown or "0.") in output
    assert ("does not take" in output) == (shown is not None)


@pytest.mark.parametrize(("weakest", "shown"), [(0.12, "0.710, weakest 0.120"), (0.71, "0.710 "), (None, "0.710 ")])
def test_the_probability_of_several_tokens_is_shown_with_the_weakest(weakest, shown):
    fact = EditedFact(EditRequest("The Louvre is in", "The Louvre", "Rome"), 0.01, 0.71, 1, weakest)
    output = printed(facts_table([Edit("edit_1", [fact], {})]))
    assert shown in output
    assert output.count("weakest") == ("weakest" in shown)
