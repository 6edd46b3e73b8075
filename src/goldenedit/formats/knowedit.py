"""KnowEdit (Zhang et al. 2024): zsRE, WikiCounterfact, WikiRecent with `prompt`, WikiBio with `concept` and `text`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goldenedit.formats.fields import Field, Format, question_in, request_fields


def matches(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the format of KnowEdit, which groups locality and portability by kind."""
    return ("concept" in record and "prompt" not in record) or any(isinstance(record.get(name), Mapping) for name in ("locality", "portability"))


def read(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the request."""
    field = Field(record)
    is_biography = "concept" in record
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


FORMAT = Format("knowedit", "prompt and locality by kind, or concept and text", matches, read)
