"""HalluEditBench (Huang et al. 2025): tables with `subject`, `object`, a question and multi-hop questions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from goldenedit.formats.fields import Answered, Field, Format, request_fields

_HOPS = re.compile(r"question_(\d+hop)")
_OUTPUT = "output_"  # the wrong answer of a model, with its name


def matches(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the format of HalluEditBench."""
    return "object" in record and "prompt" not in record and ("question" in record or "paraphrased_question" in record)


def read(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the request. The wrong answer of a model is the old one, if the table has only one.

    The answer of `reversed_relation_question` is the subject. Questions without an answer (`locality_question`) and
    those that name the answer (`yes_question`, choices) are not read.
    """
    field = Field(record)
    question = field["question"].text()
    subject = field["subject"].label()
    turned = field["reversed_relation_question"].optional_text()
    outputs = [name for name in record if str(name).startswith(_OUTPUT)]
    return [
        request_fields(
            question,
            subject,
            field["object"].answer(),
            field[outputs[0]].names() if len(outputs) == 1 else (),
            [*([(turned, (subject,))] if turned else []), *_hops(field)],
            paraphrases=field["paraphrased_question"].texts(),
            question=question,
            relation=field["relation"].optional_text(),
        )
    ]


def _hops(field: Field) -> list[Answered]:
    pairs = []
    for name in field.content:
        hops = _HOPS.fullmatch(str(name))
        if hops and not field[name].is_missing and (answer := field[f"answer_{hops[1]}"].names()):
            pairs.append((field[name].text(), answer))
    return pairs


FORMAT = Format("hallueditbench", "question and object", matches, read)
