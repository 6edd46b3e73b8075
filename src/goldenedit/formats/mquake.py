"""MQuAKE (Zhong et al. 2023): `requested_rewrite` is a list of facts, which multi-hop questions need together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goldenedit.formats.fields import Field, Format, Names, request_fields


def matches(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the format of MQuAKE."""
    return isinstance(record.get("requested_rewrite"), list | tuple)


def read(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of one request for each rewritten fact.

    The multi-hop questions follow from all facts of the record together. They become `portability` of the last request:
    whether the facts are edited as a batch or one after another, they hold once that request is edited.
    """
    field = Field(record)
    hops = [hop for name in ("single_hops", "new_single_hops") for hop in field[name].items()]
    known = [_names(hop, "answer") for hop in hops]
    rewrites = field["requested_rewrite"].items()
    if not rewrites:
        raise field["requested_rewrite"].error("must be a list of facts")
    requests = [_rewrite(rewrite, known) for rewrite in rewrites[:-1]]
    questions, answer = field["questions"].texts(), _names(field, "new_answer")
    pairs = [(question, answer) for question in questions if answer]
    return [*requests, _rewrite(rewrites[-1], [*known, _names(field, "answer")], pairs)]


def _rewrite(rewrite: Field, known: list[Names], portability: list[tuple[str, Names]] | None = None) -> dict[str, Any]:
    new, true = rewrite["target_new"].answer(), rewrite["target_true"].names()
    groups = [names for names in known if portability or {new[0], *true[:1]} & set(names)]
    return request_fields(
        rewrite["prompt"].text(),
        rewrite["subject"].label(),
        new,
        true,
        portability or (),
        aliases=groups,
        question=rewrite["question"].optional_text(),
        relation=rewrite["relation_id"].optional_text(),
    )


def _names(field: Field, name: str) -> Names:
    """Return the names of an answer: the field, and its aliases beside it."""
    return tuple(dict.fromkeys((*field[name].names(), *field[f"{name}_alias"].texts())))


FORMAT = Format("mquake", "requested_rewrite, a list", matches, read)
