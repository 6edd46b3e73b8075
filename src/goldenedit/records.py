"""The one reader of texts and facts: `.json`, `.jsonl`, `.csv`, `.tsv`, plain text, datasets and DataFrames."""

from __future__ import annotations

import ast
import codecs
import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from goldenedit.registry import meant

_BOM = codecs.BOM_UTF8  # some editors write it at the start of UTF-8 files
_BINARY = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"PAR1", b"\x1f\x8b")  # .xlsx and .zip, .xls, .parquet, .gz
_HALF = re.compile("[\ud800-\udfff]")
_LINES = (".jsonl", ".ndjson")
_TABLES = (".csv", ".tsv")
_SUFFIXES = (".json", *_LINES, *_TABLES)


class Record(NamedTuple):
    """One record of a file, and its place in the file, such as `line 3`."""

    content: Any
    place: str
    is_row: bool = False  # of a table, whose columns are the user's


def records_of(source: Any, split: str = "train") -> list[Record]:
    """Return the records of a file, a dataset on the Hub, a `datasets.Dataset`, a DataFrame, one dict or several.

    A line of a file that is not valid has its ValueError as content.

    Args:
        source: The source. A name is a dataset on the Hub, or a folder, if it is no file and has no suffix of one.
        split: Split of a dataset on the Hub, or of a `DatasetDict`.

    Raises:
        ValueError: The file or dataset as a whole is not valid.
        FileNotFoundError: There is no such file or dataset.
        ConnectionError: There is no such file, and the Hub cannot be reached.
    """
    if isinstance(source, str | Path):
        if not str(source).strip():
            raise ValueError("The name of the facts is empty. Give a file, or the name of a dataset.")
        path = Path(source)
        if path.is_file() or path.suffix.lower() in _SUFFIXES:
            return list(readable_records(path))
        if isinstance(source, Path) and not path.is_dir():
            raise FileNotFoundError(
                f"There is no file {path}.{_meant_file(path)} Give a file of facts, or the name of a dataset as a "
                "string."
            )
        return _table(_dataset(str(source), split))
    if hasattr(source, "convert_dtypes"):  # a DataFrame, in which a missing number makes all others decimal
        frame = source.convert_dtypes().astype(object)
        frame = frame.where(frame.notna(), None)
        return _table(frame.set_axis(_columns(frame.columns, "the DataFrame"), axis=1).to_dict("records"))
    if isinstance(source, Mapping):
        if hasattr(source.get(split), "column_names"):  # a DatasetDict
            return _table(source[split])
        return [Record(source, "record 0")]
    if not isinstance(source, Iterable):
        raise ValueError(f"Facts must be a file, a dataset or records, got {source!r}.")
    items = [Record(item, f"record {index}") for index, item in enumerate(source)]
    return _table(item.content for item in items) if hasattr(source, "column_names") else items


def _dataset(name: str, split: str) -> Iterable[Mapping[str, Any]]:
    """Return a split of a dataset on the Hub or in a folder."""
    from datasets import load_dataset

    try:
        return load_dataset(name, split=split)  # type: ignore[no-any-return]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name!r} is neither a file nor a dataset ({error}). Check the name.") from error
    except ConnectionError as error:
        raise ConnectionError(f"{name!r} is no file, and cannot be loaded as a dataset ({error}).") from error
    except Exception as error:  # datasets raises many kinds of errors for data that is damaged
        reason = error.__cause__ or error
        raise ValueError(f"The dataset {name!r} cannot be read ({reason}). Pass one of its files instead.") from error


def _table(rows: Iterable[Mapping[str, Any]]) -> list[Record]:
    return [Record(_unpacked(row), f"record {index}", is_row=True) for index, row in enumerate(rows)]


def read_records(path: Path, plain_text: bool = False) -> Iterator[Record]:
    """Yield the records of a UTF-8, UTF-16 or UTF-32 file. Files with one record per line are read line by line.

    - `.jsonl`, `.ndjson`: each line is a record. Only line feeds end a line, because JSON strings may contain the other
      line separators of Unicode.
    - `.json`: each item of a list is a record. An object is one record, with two exceptions: if it has a list under
      `data`, or if a list is its only value, then the items of that list are the records. A file with an object in each
      line is read like `.jsonl`.
    - `.csv`, `.tsv`: each row is a record, with the names of the first row. Empty cells are None, and spaces around the
      text of a cell are removed: nobody sees them in a spreadsheet.
    - Other suffixes: read as `.json`, or with `plain_text` as one text per line.

    Empty lines are skipped.

    Args:
        path: The file.
        plain_text: Whether files with other suffixes than those of JSON and tables are plain text.

    Raises:
        ValueError: The file is not valid; the message names the file and the line.
    """
    for record in readable_records(path, plain_text):
        if isinstance(record.content, ValueError):
            raise ValueError(f"{path}, {record.place}: {record.content}") from record.content
        if (broken := broken_text(record.content)) is not None:
            raise ValueError(f"{path}, {record.place}: {cut(broken)}")
        yield record


def broken_text(content: object) -> str | None:
    """Return the first text, in lists and objects too, with half of a character, which no tokenizer or file takes.

    JSON can hold it, as one of the two escapes of an emoji.
    """
    if isinstance(content, str):
        return content if _HALF.search(content) else None
    parts = content.values() if isinstance(content, Mapping) else content if isinstance(content, list | tuple) else ()
    return next((broken for part in parts if (broken := broken_text(part)) is not None), None)


def cut(text: str) -> str:
    """Return what to say of a text with half of a character."""
    return f"{text!r} was cut in the middle of a character. Add the other half, or remove this one."


def readable_records(path: Path, plain_text: bool = False) -> Iterator[Record]:
    """Yield the records of a file like `read_records`, but instead of a line that is not valid, its ValueError.

    Raises:
        ValueError: The file as a whole is not valid.
        FileNotFoundError: There is no such file; the message names the one that may be meant.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.{_meant_file(path)}")
    suffix = path.suffix.lower()
    if suffix in _LINES:
        yield from _json_lines(_lines(path))
    elif plain_text and suffix not in (".json", *_TABLES):
        yield from _lines(path)
    elif suffix in _TABLES:
        yield from _rows(path)
    else:
        yield from _whole(path)


def _meant_file(path: Path) -> str:
    """Return a sentence on the file beside a missing one that may be meant; or nothing."""
    return meant(path.name, (entry.name for entry in path.parent.glob("*")) if path.parent.is_dir() else ())


def _lines(path: Path) -> Iterator[Record]:
    """Yield the lines of a file with text in them; a line that is not valid UTF-8 yields its error."""
    with path.open("rb") as file:
        begin = file.read(4)
        file.seek(0)
        if begin.startswith(_BINARY) or _encoding(begin) != "UTF-8":  # line feeds have several bytes: read as a whole
            yield from _numbered(_decoded(path).split("\n"))
            return
        for number, line in enumerate(file, 1):  # in UTF-8, the byte of a line feed is never part of another character
            place = f"line {number}"
            try:
                text = (line.removeprefix(_BOM) if number == 1 else line).decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield Record(ValueError(f"not valid UTF-8 ({error}). Save the file as UTF-8."), place)
                continue
            if text.strip():
                yield Record(text, place)


def _numbered(lines: list[str]) -> Iterator[Record]:
    yield from (Record(line.rstrip("\r"), f"line {number}") for number, line in enumerate(lines, 1) if line.strip())


def _json_lines(lines: Iterator[Record]) -> Iterator[Record]:
    for line in lines:
        yield line if isinstance(line.content, ValueError) else Record(_parsed(line.content), line.place)


def _whole(path: Path) -> Iterator[Record]:
    text = _decoded(path)
    content = _parsed(text)
    if not isinstance(content, ValueError):
        yield from (Record(item, f"record {index}") for index, item in enumerate(_items(content)))
        return
    lines = list(_json_lines(_numbered(text.split("\n"))))
    if not lines or not isinstance(lines[0].content, dict):
        raise ValueError(f"{path}: {content}") from content
    yield from lines


def _decoded(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith(_BINARY):
        raise ValueError(f"{path} is a spreadsheet or an archive, no text. Save it as CSV, or pass a DataFrame.")
    encoding = _encoding(data)
    try:
        return data.removeprefix(_BOM).decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid {encoding} ({error}). Save the file as UTF-8.") from error


def _encoding(data: bytes) -> str:
    """Return the encoding of a text, told by its first bytes: UTF-8, or a wider one with or without a mark."""
    return json.detect_encoding(data[:4]).upper().removesuffix("-SIG")


def _parsed(text: str) -> Any:
    """Return the content of a JSON text, or a ValueError that says why it is not valid."""
    try:
        return json.loads(text)
    except RecursionError:
        return ValueError("JSON is nested too deeply.")
    except ValueError as error:
        return ValueError(f"not valid JSON ({error}).")


def _items(content: Any) -> list[Any]:
    if isinstance(content, list):
        return content
    if isinstance(content, dict):
        items = content.get("data", next(iter(content.values())) if len(content) == 1 else None)
        if isinstance(items, list):
            return items
    return [content]


def _rows(path: Path) -> Iterator[Record]:
    """Yield the rows of a table as objects. Names of columns are written as in JSON: `Target new` is `target_new`."""
    text = _decoded(path)
    head = next((line for line in text.split("\n") if line.strip()), "")
    separators = "\t" if path.suffix.lower() == ".tsv" else ",;\t"  # spreadsheets write ";" where "," is in numbers
    separator = max(separators, key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    names: list[str] = []
    start = 1
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:  # the rest of the file is lost, because it is taken for one cell
            remedy = "Close all quotes, and double those inside."
            raise ValueError(f"{path}, line {start}: not valid CSV ({error}). {remedy}") from error
        if cells is None:
            return
        place, start = f"line {start}", reader.line_num + 1
        if not any(cell.strip() for cell in cells):
            continue
        if not names:
            names = _columns(cells, f"{path}, {place}")
        elif any(cell.strip() for cell in cells[len(names) :]):
            need = "Put cells that contain the separator in quotes."
            yield Record(ValueError(f"the row has {len(cells)} cells for {len(names)} columns. {need}"), place)
        else:
            row = dict(zip(names, (cell.rstrip(" \t") for cell in cells), strict=False))
            yield Record(_unpacked({name: row.get(name) or None for name in names}), place, is_row=True)


def _columns(titles: Iterable[Any], place: str) -> list[str]:
    """Return the names of columns as fields are written: `Target new` is `target_new`."""
    names = ["_".join(str(title).lower().replace("-", " ").split()) for title in titles]
    names = [name or f"column {number}" for number, name in enumerate(names, 1)]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{place}: several columns are named {repeated}. Rename all but one of each.")
    return names


def _unpacked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row in which lists and objects that were written as text are read."""
    return {name: _cell(value) for name, value in row.items()}


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value.tolist() if hasattr(value, "tolist") else value  # a list is an array in some tables
    text = value.strip()
    if (text[:1], text[-1:]) not in (("[", "]"), ("{", "}")):
        return value
    for parse in (json.loads, ast.literal_eval):  # pandas writes lists as Python does
        try:
            return parse(text) or value
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return value
