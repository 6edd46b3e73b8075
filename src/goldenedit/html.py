"""Tables for notebooks: what `_repr_html_` returns, readable in light and dark themes."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

_CELL = "text-align:left;padding:2px 12px 2px 0"


class Bar(float):
    """A number in [0, 1], which is drawn as a bar."""


def table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "", bold: Iterable[int] = ()) -> str:
    """Return a table as HTML. All texts are escaped, because those of a stranger's edit could be markup.

    Args:
        columns: The headers.
        rows: The cells of each row; a `Bar` is drawn, all others are shown as text.
        title: The line above the table.
        bold: Numbers of rows to emphasize.
    """
    emphasized = set(bold)
    head = "".join(f'<th style="{_CELL}">{html.escape(column)}</th>' for column in columns)
    body = []
    for number, row in enumerate(rows):
        weight = ";font-weight:bold" if number in emphasized else ""
        cells = "".join(f'<td style="{_CELL}{weight}">{_cell(cell, number in emphasized)}</td>' for cell in row)
        body.append(f"<tr>{cells}</tr>")
    above = f"<div><b>{html.escape(title)}</b></div>" if title else ""
    return f"{above}<table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _cell(cell: object, is_bold: bool) -> str:
    if not isinstance(cell, Bar):
        return html.escape(str(cell))
    color = "#d9822b" if is_bold else "#7a8ca8"
    width = min(max(cell, 0.0), 1.0) * 240
    return f'<div style="width:{width:.0f}px;height:10px;background:{color}"></div>'
