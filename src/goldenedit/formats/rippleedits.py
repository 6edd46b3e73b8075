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
_VERB = re.compile(rf"(?:{'|'.join(_AFTER)}) ")
_PROMPT = re.compile(rf"(?:{'|'.join(_BEFORE)})(?P<subject>.+?)(?:{'|'.join(_AFTER)})", re.DOTALL)


def matches(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the format of RippleEdits."""
    edit = record.get("edit")
    return isinstance(edit, Mapping) and ("target_id" in edit or any(name in record for name in _FOLLOWING))


def read(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the request."""
    field = Field(record)
    edit = field["edit"]
    old = edit.first("original_fact", "previous_fact")
    old_sentence = "" if old.is_missing else old["prompt"].text().strip().removesuffix(".")
    following, unrelated = _pairs(field, _FOLLOWING), _pairs(field, _UNRELATED)
    others = [old_sentence, *(prompt for prompt, _ in (*following, *unrelated))]
    prompt, subject, target = _parts(edit["prompt"], others)
    return [
        request_fields(
            prompt,
            subject,
            (target,),
            (old_sentence.removeprefix(f"{prompt} "),) if old_sentence.startswith(f"{prompt} ") else (),
            following,
            unrelated,
            relation=edit["relation"].optional_text(),
        )
    ]


def _parts(edited: Field, others: list[str]) -> tuple[str, str, str]:
    """Return prompt, subject and target of a sentence.

    A verb can be part of the subject, as in "Life is Beautiful". So the longest subject counts that the other sentences
    of the record are about too, else the shortest.
    """
    sentence = edited.text().rstrip().removesuffix(".")
    parts = []
    for verb in _VERB.finditer(sentence):
        prompt, target = sentence[: verb.end() - 1], sentence[verb.end() :]
        if (match := _PROMPT.fullmatch(prompt)) and target.strip():
            parts.append((prompt, match["subject"], target))
    if not parts:
        raise edited.error("must be a sentence such as 'The name of the mother of Ada Lovelace is Anne Byron.'")
    named = [part for part in parts if any(part[1] in other for other in others)]
    return named[-1] if named else parts[0]


def _pairs(field: Field, names: tuple[str, ...]) -> list[Answered]:
    """Return the prompts and answers of all tests in these lists. Of several answers, the first is used."""
    tests = [test for name in names for test in field[name].items()]
    return [pair for test in tests for pair in test["test_queries"].pairs("prompt", "answers")]


FORMAT = Format("rippleedits", "edit with subject_id and target_id", matches, read)
