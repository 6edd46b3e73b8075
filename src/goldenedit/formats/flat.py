"""The flat form of EasyEdit and WikiBigEdit: `rephrase_prompt`, `locality_prompt` and `locality_ground_truth`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goldenedit.formats import plain
from goldenedit.formats.fields import Answered, Field, Format, is_among, question_in

NAMES = (
    "ground_truth",
    "rephrase_prompt",
    "rephrase",
    "locality_prompt",
    "locality_ground_truth",
    "portability_prompt",
    "portability_ground_truth",
)


def matches(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the flat form."""
    return any(name in record for name in NAMES)


def read(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the request, together with those that are named as in a request."""
    field = Field(record)
    [fields] = plain.read(plain.known_fields(record))
    true = field["ground_truth"].names()
    true = () if is_among(fields["target_new"], true) else true
    if true:
        fields.setdefault("target_true", true[0])
    pairs = {kind: _pairs(field, kind) for kind in ("portability", "locality")}
    for kind, answered in pairs.items():
        fields[kind] = [*fields.get(kind, ()), *((prompt, names[0]) for prompt, names in answered)]
    groups = [true, *(names for answered in pairs.values() for _, names in answered)]
    fields["aliases"] += [names for names in groups if len(names) > 1]
    if rephrased := field.first("rephrase_prompt", "rephrase").texts():
        fields["paraphrases"] = [*fields.get("paraphrases", ()), *rephrased]
    if "prompt" in fields:
        fields.setdefault("question", question_in(fields["prompt"]))
    return [fields]


def _pairs(field: Field, kind: str) -> list[Answered]:
    prompts = field[f"{kind}_prompt"]
    if prompts.is_missing:
        return []
    if field[f"{kind}_ground_truth"].is_missing:
        raise ValueError(f"{kind}_prompt has no {kind}_ground_truth. Add the answer, or remove the prompt.")
    return Field({"prompt": prompts.content, "ground_truth": field[f"{kind}_ground_truth"].content}, kind).pairs()


FORMAT = Format("flat", "prompt, and ground_truth or rephrase_prompt or locality_prompt", matches, read)
