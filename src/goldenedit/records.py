"""The one reader of files that hold texts or facts: `.json`, `.jsonl`, or a text a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_BOM = b"\xef\xbb\xbf"  # that some editors put before UTF-8


class Record(NamedTuple):
    """One record of a file, and where it stands there, such as `line 3`."""

    content: Any
    place: str


def read_records(path: Path, plain_text: bool = False) -> Iterator[Record]:
    """Yield the records of a file in UTF-8, line by line where each has a line of its own.

    - `.jsonl`, `.ndjson`: each line is a record. Lines end with a line feed alone: JSON may hold all other line ends.
    - `.json`: each item of a list is a record. An object is one record, unless it has a list under `data`, or has
      nothing but a list: then the list's items are the records.
    - All else: JSON as well, or with `plain_text` a text a line.

    Lines without text are skipped.

    Raises:
        ValueError: The file is damaged; the message names it and the line.
    """
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        for place, line in _lines(path):
            yield Record(_parsed(line, f"{path}, {place}"), place)
    elif plain_text and suffix != ".json":
        for place, line in _lines(path):
            yield Record(line, place)
    else:
        for index, item in enumerate(_items(_whole(path))):
            yield Record(item, f"record {index}")


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    with path.open("rb") as file:  # a line feed is no part of any other character of UTF-8
        for number, line in enumerate(file, 1):
            place = f"line {number}"
            text = _decoded(line.removeprefix(_BOM) if number == 1 else line, f"{path}, {place}").rstrip("\r\n")
            if text.strip():
                yield place, text


def _whole(path: Path) -> Any:
    text = _decoded(path.read_bytes().removeprefix(_BOM), str(path))
    try:
        return _parsed(text, str(path))
    except ValueError as error:
        if "Extra data" in str(error):
            raise ValueError(f"{error} If each line is a record of its own, name the file .jsonl.") from error
        raise


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error}). Save the file in UTF-8.") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where}: not valid JSON, nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}).") from error


def _items(content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    if isinstance(content, dict):
        held = content.get("data", next(iter(content.values())) if len(content) == 1 else None)
        if isinstance(held, list):
            return held
    return [content]
