"""Read records of any format as facts, and tell which records cannot be read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from goldenedit.formats import FORMATS, Format, flat, format_of, plain
from goldenedit.formats.fields import shortened
from goldenedit.records import Record

logger = logging.getLogger(__name__)

Fact = TypeVar("Fact")

_TOLD = 3  # damaged records that an error or a warning names


def read_record(record: Any) -> list[dict[str, Any]]:
    """Return the fields of all requests of one record, which has no fields that are unknown.

    Raises:
        ValueError: The record is in no known format, or a field is missing, unknown or invalid.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"A record must map names of fields to values, got {shortened(record)}.")
    form = format_of(record) or plain.FORMAT
    if form == plain.FORMAT and (unknown := plain.unknown_fields(record)):
        raise ValueError(f"Unknown fields {unknown}. The fields of a request are {sorted(plain.FIELDS)}.")
    return form.read(record)


def read_facts(
    kind: type[Fact],
    records: Sequence[Record],
    source: str = "",
    forced: Format | None = None,
    skip_bad: bool | None = None,
) -> list[Fact]:
    """Return the facts of all records.

    If the fields of a record tell no format, it is taken to be in the format of most others.

    Args:
        kind: `EditRequest`, which is made of the fields that a format reads.
        records: Records, or facts, which are returned as they are.
        source: Name of the file or dataset, for messages.
        forced: The format of all records. By default, their fields tell it.
        skip_bad: Whether to leave out records that cannot be read, with a warning; None if the caller cannot choose.

    Raises:
        ValueError: Records cannot be read. The message names the first ones and their fields.
    """
    records = [part for record in records for part in _parts(record)]
    forms = [forced or format_of(record.content) for record in records]
    common = Counter(form for form in forms if form is not None).most_common(1)
    facts: list[Fact] = []
    faults: list[str] = []
    for record, form in zip(records, forms, strict=True):
        place = f"{source}, {record.place}" if source else record.place
        if isinstance(record.content, kind):
            facts.append(record.content)
            continue
        if form is None and common:
            form = common[0][0]
        if form is None and isinstance(record.content, Mapping):
            raise ValueError(f"{place}: {_unknown(record.content)}")
        try:
            facts += [kind(**fields) for fields in _fields(record, form)]
        except ValueError as error:
            faults.append(f"{place}: {error}")
    if faults:
        _tell_faults(faults, len(records), skip_bad)
    _tell_formats(records, forms, source)
    return facts


def _parts(record: Record) -> list[Record]:
    """Return the records of an object that has records by their names, such as a file of UniEdit."""
    content = record.content
    if isinstance(content, Mapping) and format_of(content) is None and any(map(format_of, content.values())):
        return [Record(part, f"record {name!r}") for name, part in content.items()]
    return [record]


def _fields(record: Record, form: Format | None) -> list[dict[str, Any]]:
    content = record.content
    if isinstance(content, ValueError):  # a line that is not valid
        raise content
    if form is None or not isinstance(content, Mapping):
        raise ValueError(f"A record must map names of fields to values, got {shortened(content)}.")
    if not record.is_row or form not in (plain.FORMAT, flat.FORMAT):
        return form.read(content)
    if form == flat.FORMAT:
        return form.read(plain.with_lists(content))
    try:
        return form.read(plain.with_lists(plain.known_fields(content)))
    except ValueError:
        plain.check_columns(content)  # a column of the user's own may be a misspelled one
        raise


def _unknown(record: Mapping[str, Any]) -> str:
    known = "; ".join(f"{form.name} ({form.needs})" for form in FORMATS if form != plain.FORMAT)
    return (
        f"No known format has the fields {sorted(map(str, record))}. Rename them to prompt, subject and target. The "
        f"formats of published facts are read too: {known}."
    )


def _tell_faults(faults: list[str], total: int, skip_bad: bool | None) -> None:
    """Raise an error that names the first faults, or with `skip_bad` log them."""
    told = "\n".join(faults[:_TOLD])
    if skip_bad and len(faults) < total:
        logger.warning("%d of %d records cannot be read and were left out. The first:\n%s", len(faults), total, told)
        return
    if total > 1:
        told += f"\n{len(faults)} of {total} records cannot be read."
        if skip_bad is False and len(faults) < total:
            told += " Correct them, or leave them out with skip_bad=True (on the command line, --skip-bad)."
    raise ValueError(told)


def _tell_formats(records: Sequence[Record], forms: Sequence[Format | None], source: str) -> None:
    """Log which formats were read, and which fields were ignored."""
    for form, count in Counter(form for form in forms if form is not None).items():
        logger.info("Read %d records in the format %s from %s.", count, form.name, source or "memory")
    pairs = zip(records, forms, strict=True)
    known = {plain.FORMAT.name: (), flat.FORMAT.name: flat.NAMES}  # of other formats, records have fields of their own
    own = [
        (record.content, known[form.name])
        for record, form in pairs
        if form is not None and form.name in known and isinstance(record.content, Mapping)
    ]
    if unknown := sorted({name for content, others in own for name in plain.unknown_fields(content, others)}):
        logger.warning("These fields are no fields of a request and were ignored: %s.", ", ".join(unknown))
