"""CounterFact (Meng et al. 2022): `requested_rewrite`, with paraphrase, neighborhood and generation prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goldenedit.formats.fields import Field, Format, request_fields


def matches(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the format of CounterFact."""
    return "requested_rewrite" in record


def read(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the request."""
    field = Field(record)
    rewrite = field["requested_rewrite"]
    return [
        request_fields(
            rewrite["prompt"].text(),
            rewrite["subject"].label(),
            rewrite["target_new"]["str"].answer(),
            rewrite["target_true"]["str"].answer(),
            paraphrases=field["paraphrase_prompts"].texts(),
            neighborhood=field["neighborhood_prompts"].texts(),
            generation=field["generation_prompts"].texts(),
            relation=rewrite["relation_id"].optional_text(),
        )
    ]


FORMAT = Format("counterfact", "requested_rewrite", matches, read)
