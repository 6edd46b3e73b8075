"""Text of strangers in Markdown: what a model wrote, or what a fact says, must be shown and never obeyed."""

from __future__ import annotations

import re
import unicodedata

_JOINERS = "\u200c\u200d"  # scripts and emoji need them
_ESCAPES = {
    **{mark: f"\\{mark}" for mark in "`*_[]~|"},
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
    return "<br>".join("".join(map(_shown, line)) for line in lines)


def _shown(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cf", "Cs") and character not in _JOINERS:
        return "\ufffd"
    return _ESCAPES.get(character, character)
