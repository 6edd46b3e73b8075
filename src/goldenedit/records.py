"""The one reader of files with texts or facts: `.json`, `.jsonl`, or plain text with one text per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

_BOM = b"\xef\xbb\xbf"  # some editors write it at the start of UTF-8 files


class Record(NamedTuple):
    """One record of a file, and its place in the file, such as `line 3`."""

    content: Any
    place: str


def read_records(path: Path, plain_text: bool = False) -> Iterator[Record]:
    """Yield the records of a UTF-8 file. Files with one record per line are read line by line.

    - `.jsonl`, `.ndjson`: each line is a record. Only line feeds end a line, because JSON strings may contain the other
      line separators of Unicode.
    - `.json`: each item of a list is a record. An object is one record, with two exceptions: if it has a list under
      `data`, or if a list is its only value, then the items of that list are the records.
    - Other suffixes: read as JSON, or with `plain_text` as one text per line.

    Empty lines are skipped.

    Args:
        path: The file.
        plain_text: Whether files with other suffixes are plain text.

    Raises:
        ValueError: The file is not valid; the message names the file and the line.
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
    with path.open("rb") as file:  # in UTF-8, the byte of a line feed is never part of another character
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
            raise ValueError(f"{error} If each line is a separate record, rename the file to .jsonl.") from error
        raise


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid UTF-8 ({error}). Save the file as UTF-8.") from error


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(f"{where}: JSON is nested too deeply.") from error
    except ValueError as error:
        raise ValueError(f"{where}: not valid JSON ({error}).") from error


def _items(content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    if isinstance(content, dict):
        items = content.get("data", next(iter(content.values())) if len(content) == 1 else None)
        if isinstance(items, list):
            return items
    return [content]
