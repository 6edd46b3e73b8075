"""KnowEdit (Zhang et al. 2024): zsRE, WikiCounterfact, WikiRecent with `prompt`, WikiBio with `concept` and `text`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goldenedit.formats.fields import Field, Format, question_in, request_fields


def matches(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the format of KnowEdit, which groups locality and portability by kind."""
    by_kind = any(isinstance(record.get(name), Mapping) for name in ("locality", "portability"))
    return by_kind or _is_biography(record)


def read(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the request."""
    field = Field(record)
    is_biography = _is_biography(record)
    names = ("text", "concept", "labels") if is_biography else ("prompt", "subject", "target_new")
    prompt, subject, target_new = (field[name] for name in names)
    return [
        request_fields(
            prompt.text(),
            subject.label(),
            target_new.answer(),
            field["ground_truth"].names(),
            field["portability"].kinds(),
            field["locality"].kinds(),
            paraphrases=field.first("rephrase_prompt", "rephrase").texts(),
            question=None if is_biography else question_in(prompt.text()),
        )
    ]


def _is_biography(record: Mapping[str, Any]) -> bool:
    return "concept" in record and "prompt" not in record


FORMAT = Format("knowedit", "prompt and locality by kind, or concept and text", matches, read)
