"""The flat form of EasyEdit and WikiBigEdit: `rephrase_prompt`, `locality_prompt` and `locality_ground_truth`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goldenedit.formats.fields import Answered, Field, Format, question_in, request_fields

_NAMES = (
    "ground_truth",
    "rephrase_prompt",
    "locality_prompt",
    "locality_ground_truth",
    "portability_prompt",
    "portability_ground_truth",
)


def matches(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the flat form."""
    return any(name in record for name in _NAMES)


def read(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the request."""
    field = Field(record)
    prompt = field["prompt"].text()
    target_new = field.first("target_new", "target").answer()
    return [
        request_fields(
            prompt,
            field["subject"].label(),
            target_new,
            field.first("ground_truth", "target_true").names(),
            _pairs(field, "portability"),
            _pairs(field, "locality"),
            paraphrases=field.first("rephrase_prompt", "paraphrases").texts(),
            question=field["question"].optional_text() or question_in(prompt),
        )
    ]


def _pairs(field: Field, kind: str) -> list[Answered]:
    prompts = field[f"{kind}_prompt"]
    if prompts.is_missing:
        return []
    return Field({"prompt": prompts.content, "ground_truth": field[f"{kind}_ground_truth"].content}, kind).pairs()


FORMAT = Format("flat", "prompt, and ground_truth or rephrase_prompt or locality_prompt", matches, read)
