"""QAEdit (Yang et al. 2025): questions with `target`, `rephrase` and a list of unrelated questions `loc`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goldenedit.formats.fields import Field, Format, request_fields


def matches(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the format of QAEdit."""
    locality = record.get("locality")
    entries = locality if isinstance(locality, list | tuple) else [locality]
    return any(isinstance(entry, Mapping) and "loc" in entry for entry in entries)


def read(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the request. Every prompt is a question, even without a question mark."""
    field = Field(record)
    question = field["prompt"].text()
    return [
        request_fields(
            question,
            field["subject"].label(),
            field.first("target", "target_new").answer(),
            locality=field["locality"].pairs("loc", "loc_ans"),
            paraphrases=field["rephrase"].texts(),
            question=question,
        )
    ]


FORMAT = Format("qaedit", "prompt, target and locality with loc", matches, read)
