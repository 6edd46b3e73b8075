"""Text of strangers in Markdown: what a model wrote, or what a fact says, must be shown and never obeyed."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

_JOINERS = "\u200c\u200d"  # scripts and emoji need them
_ESCAPES = {
    **{mark: f"\\{mark}" for mark in "`*[]~|"},
    "&": "&amp;",
    "<": "&lt;",
    ">": "&gt;",
    "$": "&#36;",
    "\\": "&#92;",  # the Hub takes a doubled backslash before a bracket for a formula
}


def literal(text: str) -> str:
    r"""Return a text for one cell of a Markdown table, so that readers see it as it is.

    Line ends become `<br>`, and control characters U+FFFD: they could hide text or change the direction of writing.

    Example:
        ```python
        >>> literal("a | b\n<b>`c`</b>")
        'a \\| b<br>&lt;b&gt;\\`c\\`&lt;/b&gt;'
        ```
    """
    lines = re.split(r"\r\n|[\r\n\u2028\u2029]", text.replace("\t", " "))
    # Inside a word, as in `max_length`, `_` means nothing.
    return "<br>".join(re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\_", "".join(map(_shown, line))) for line in lines)


def code(text: str) -> str:
    r"""Return a text for one cell of a Markdown table as code, or like `literal` where code would not show it as it is.

    Example:
        ```python
        >>> code("org/base_model"), code("a|b")
        ('`org/base_model`', 'a\\|b')
        ```
    """
    is_code = text.isprintable() and text.strip() == text != "" and not {"`", "|"} & set(text)
    return f"`{text}`" if is_code else literal(text)


def python_literal(value: Any) -> str:
    r"""Return texts, and lists and dicts of them, as Python code on one line. Characters that are hidden are escaped.

    Example:
        ```python
        >>> print(python_literal("two\nlines"))
        "two\nlines"
        ```
    """
    return "".join(map(_escaped, json.dumps(value, ensure_ascii=False)))


def _shown(character: str) -> str:
    return "\ufffd" if _is_hidden(character) else _ESCAPES.get(character, character)


def _escaped(character: str) -> str:
    if not _is_hidden(character) and character not in "\u2028\u2029":
        return character
    return f"\\u{ord(character):04x}" if ord(character) <= 0xFFFF else f"\\U{ord(character):08x}"


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in _JOINERS
