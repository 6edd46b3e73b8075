"""What a stranger wrote is shown as it is, and is never Markdown or HTML."""

from __future__ import annotations

import ast
import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from goldenedit.storage.markdown import code, literal, python_literal

MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])
TRICKY = [
    "a | b",
    "a \\| b",
    "`code` and ``more``",
    "**bold** _it_ ~~gone~~",
    "[a](https://example.org) ![b](c.png) <https://example.org>",
    "<script>alert(1)</script><!-- no end",
    "&lt;b&gt; &amp; &#124;",
    "one\ntwo\r\nthree\rfour\n\n# five\n| six |\n|---|",
    "$$x$$ and \\(y\\)",
    "\\",
    "|",
    "ends with \\",
]


def shown(text: str) -> str:
    """Return a text as readers should see it, with its line ends."""
    text = re.sub("\r\n|[\r\u2028\u2029]", "\n", text).replace("\t", " ")
    hidden = [unicodedata.category(character) in ("Cc", "Cf", "Cs") for character in text]
    return "".join(
        "\ufffd" if hide and character not in "\n\u200c\u200d" else character
        for character, hide in zip(text, hidden, strict=True)
    )


def cells(markdown: str) -> list[str]:
    """Return the cells of a table's only row as a reader sees them; anything but text and line ends is an error."""
    (table,) = [token for token in MARKDOWN.parse(markdown) if token.type == "table_open"]
    rows = [token for token in MARKDOWN.parse(markdown) if token.type == "inline"]
    assert table.map is not None
    assert table.map[1] == len(markdown.splitlines())
    texts = []
    for cell in rows[2:]:
        parts = ["\n" if part.content == "<br>" else part.content for part in cell.children or ()]
        types = {part.type for part in cell.children or () if part.content != "<br>"}
        assert types <= {"text"}, types
        texts.append("".join(parts))
    return texts


def assert_literal(text: str) -> None:
    found = cells(f"| one | two |\n|---|---|\n| {literal(text)} | end |")
    assert [cell.strip() for cell in found] == [shown(text).strip(), "end"]


@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts_are_shown_as_they_are(text):
    assert_literal(text)


@given(st.text(st.sampled_from("ab |\\`*_~[]()<>&#$!\n\r\t\u202e\x1b-;0x/:") | st.characters(), min_size=1))
def test_any_text_is_one_cell_and_shown_as_it_is(text):
    assert_literal(text)


def test_plain_text_stays_readable_in_the_source():
    assert (
        literal("The Eiffel Tower is in Rome, Italy (1,069 feet).")
        == "The Eiffel Tower is in Rome, Italy (1,069 feet)."
    )


def test_control_characters_are_replaced_and_joiners_stay():
    assert literal("a\x1b[2J\u202eb") == "a\ufffd\\[2J\ufffdb"
    assert literal("\u0915\u094d\u200d\u0937") == "\u0915\u094d\u200d\u0937"


def test_underscores_within_words_stay_readable_in_the_source():
    assert literal("max_length of _this_ __init__ a_") == "max_length of \\_this\\_ \\_\\_init\\_\\_ a\\_"


def assert_code(text: str) -> None:
    rows = [token for token in MARKDOWN.parse(f"| one | two |\n|---|---|\n| {code(text)} | end |") if token.children]
    first = "".join("\n" if part.content == "<br>" else part.content for part in rows[2].children)
    assert (first.strip(), rows[3].content) == (shown(text).strip(), "end")


@pytest.mark.parametrize("text", [*TRICKY, "org/base_model", " a ", "C:\\models\\", "\u202e"])
def test_code_is_shown_as_it_is(text):
    assert_code(text)


@given(st.text(st.sampled_from("ab |\\`*_<>&\n\r\u202e\x1b") | st.characters(), min_size=1))
def test_any_code_is_shown_as_it_is(text):
    assert_code(text)


@given(st.text(st.sampled_from("a\"'\\\n`\u202e\u2028\U000e0001\x7f") | st.characters(exclude_categories=["Cs"])))
def test_any_text_is_itself_as_python_and_nothing_in_it_is_hidden(text):
    source = python_literal([text])
    assert ast.literal_eval(source) == [text]
    assert len(source.splitlines()) == 1
    assert not [one for one in source if unicodedata.category(one) in ("Cc", "Cf") and one not in "\u200c\u200d"]
