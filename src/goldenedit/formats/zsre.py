"""zsRE in the form of MEND (Mitchell et al. 2022): the prompt `src` is a question, and `alt` is the new answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goldenedit.formats.fields import Answered, Field, Format, request_fields

_MARKER = "nq question: "  # tells the origin of an unrelated question; no text for a model


def matches(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the form of MEND."""
    return "prompt" not in record and ("src" in record or "alt" in record)


def read(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the request."""
    field = Field(record)
    question = field["src"].text()
    unrelated = field["loc"].optional_text()
    answer = field["loc_ans"].names()
    return [
        request_fields(
            question,
            field["subject"].label(),
            field["alt"].answer(),
            field["answers"].names(),
            _portability(field["portability"]),
            [(unrelated.removeprefix(_MARKER), answer)] if unrelated and answer else (),
            paraphrases=field["rephrase"].texts(),
            question=question,
        )
    ]


def _portability(field: Field) -> list[Answered]:
    """Return the question that EasyEdit adds to a record, with its answer."""
    if field.is_missing:
        return []
    answer = field["New Answer"].names()
    return [(field["New Question"].text(), answer)] if answer else []


FORMAT = Format("zsre", "src and alt", matches, read)
