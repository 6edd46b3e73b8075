"""WikiBigEdit (Thede et al. 2025) and UltraEditBench (Gu et al. 2025): questions with the answer `ans`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goldenedit.formats.fields import Answered, Field, Format, question_in, request_fields


def matches(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the format of WikiBigEdit, whose prompt is `update`, or of UltraEditBench."""
    return "ans" in record and ("update" in record or "loc" in record)


def read(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the request. `personas` is the question as another person would ask it."""
    field = Field(record)
    prompt = field.first("update", "prompt").text()
    answer = field["ans"].answer()
    persona = field["personas"].optional_text()
    return [
        request_fields(
            prompt,
            field["subject"].label(),
            answer,
            portability=[*([(persona, answer)] if persona else []), *_pair(field, "mhop")],
            locality=_pair(field, "loc"),
            paraphrases=field.first("rephrase", "rephrase_prompt").texts(),
            relation=field["relation"].optional_text(),
            question=question_in(prompt),
        )
    ]


def _pair(field: Field, name: str) -> list[Answered]:
    """Return a question of the record with its answer, nothing if the record has none."""
    question, answer = field[name].optional_text(), field[f"{name}_ans"].names()
    return [(question, answer)] if question and answer else []


FORMAT = Format("wikibigedit", "update or prompt, and ans", matches, read)
