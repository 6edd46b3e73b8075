"""RippleEdits (Cohen et al. 2023): an edit as a whole sentence, with six lists of tests."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from goldenedit.formats.fields import Answered, Field, Format, request_fields

_FOLLOWING = ("Logical_Generalization", "Compositionality_I", "Compositionality_II", "Subject_Aliasing")
_UNRELATED = ("Relation_Specificity", "Relation_Specifity", "Forgetfulness")  # the set's README misspells the first

# Subject and target have Wikidata numbers, but no names. Their names are in the sentence, which has one of these forms.
_BEFORE = (
    "The number of children ",
    "The name of the award ",
    "The name of the (?:position held by|currency in) ",
    "The name of the [a-z ]+? which ",
    "The (?:names? of the )?"
    "(?:country of citizenship|place of [a-z]+|date of [a-z]+|head of [a-z]+|field of work|[a-z ]+?) of ",
    "",
)
_AFTER = (
    " has is",
    " won is",
    " is associated with is",
    " is a member of is",
    " is part of is",
    " is the capital of is",
    " plays in is",
    " is followed by",
    " follows",
    " is",
    " are",
)
_SENTENCE = re.compile(
    rf"(?P<prompt>(?:{'|'.join(_BEFORE)})(?P<subject>.+?)(?:{'|'.join(_AFTER)})) (?P<target>.+?)\.?\s*", re.DOTALL
)


def matches(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the format of RippleEdits."""
    edit = record.get("edit")
    return isinstance(edit, Mapping) and ("target_id" in edit or any(name in record for name in _FOLLOWING))


def read(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the request."""
    field = Field(record)
    edit = field["edit"]
    sentence = _SENTENCE.fullmatch(edit["prompt"].text())
    if sentence is None:
        raise edit["prompt"].error("must be a sentence such as 'The name of the mother of Ada Lovelace is Anne Byron.'")
    old = edit.first("original_fact", "previous_fact")
    old_sentence = "" if old.is_missing else old["prompt"].text().strip().removesuffix(".")
    prompt = f"{sentence['prompt']} "
    return [
        request_fields(
            sentence["prompt"],
            sentence["subject"],
            (sentence["target"],),
            (old_sentence.removeprefix(prompt),) if old_sentence.startswith(prompt) else (),
            _pairs(field, _FOLLOWING),
            _pairs(field, _UNRELATED),
            relation=edit["relation"].optional_text(),
        )
    ]


def _pairs(field: Field, names: tuple[str, ...]) -> list[Answered]:
    """Return the prompts and answers of all tests in these lists. Of several answers, the first is used."""
    tests = [test for name in names for test in field[name].items()]
    return [pair for test in tests for pair in test["test_queries"].pairs("prompt", "answers")]


FORMAT = Format("rippleedits", "edit with subject_id and target_id", matches, read)
