"""The format of this library: the fields of an `EditRequest`, as JSON or as the columns of a table."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from goldenedit.formats.fields import Field, Format, Names

_TEXTS = ("prompts", "paraphrases", "neighborhood", "generation")
_PAIRS = ("portability", "locality")
LISTS = (*_TEXTS, *_PAIRS, "aliases")
FIELDS = (
    "prompt", "messages", "subject", "target_new", "target_true", "question", "relation", "joint", *LISTS
)  # fmt: skip
SYNONYMS = {"target": "target_new", "paraphrase": "paraphrases", "relation_id": "relation"}


def matches(record: Mapping[str, Any]) -> bool:
    """Return whether a record has fields of a request."""
    return any(name in record for name in ("prompt", "messages", "subject", "target_new", "target"))


def unknown_fields(record: Mapping[str, Any], others: Collection[str] = ()) -> list[str]:
    """Return the fields with a value that neither belong to a request nor are among others, sorted."""
    known = {*FIELDS, *SYNONYMS, *others}
    unknown = [Field(value, str(name)) for name, value in record.items() if name not in known]
    return sorted(field.path for field in unknown if not field.is_missing)


def known_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record that belong to a request."""
    return {name: value for name, value in record.items() if name in FIELDS or name in SYNONYMS}


def with_lists(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a table as a record: a text in the column of a list is its only item."""
    lists = {name for name in row if SYNONYMS.get(name, name) in LISTS}
    return {name: [value] if name in lists and isinstance(value, str) else value for name, value in row.items()}


def check_columns(row: Mapping[str, Any]) -> None:
    """Raise a ValueError for an unknown column that looks like a misspelled one, if that one is missing."""
    there = {SYNONYMS.get(name, name) for name in row}
    for name in unknown_fields(row):
        if (meant := _meant(name)) and SYNONYMS.get(meant, meant) not in there:
            raise ValueError(f"The column {name!r} is unknown. Did you mean {meant!r}? Rename or remove it.")


def read(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the request. Unknown fields are left out, unless they look like misspelled ones."""
    for name in unknown_fields(record):
        if meant := _meant(name):
            raise ValueError(f"The field {name!r} is unknown. Did you mean {meant!r}? Rename or remove it.")
    values: dict[str, Field] = {}
    for name, value in record.items():
        field = Field(value, name)
        known = SYNONYMS.get(name, name)
        if known not in FIELDS or (field.is_missing and name != "joint"):
            continue
        if known in values:
            raise ValueError(f"The fields {values[known].path!r} and {name!r} mean the same. Keep one of them.")
        values[known] = field
    taught = next((name for name in ("messages", "prompt", "prompts") if name in values), "prompt")
    for name in (taught, "subject", "target_new"):
        if name not in values:
            there = sorted(map(str, record))
            raise ValueError(f"The field {_told(name, record)} is missing or empty. The record has {there}.")
    return [_request(values)]


def _told(name: str, record: Mapping[str, Any]) -> str:
    """Return how a field is called in an error: as the record calls it, or else by all its names."""
    names = [name, *(synonym for synonym, known in SYNONYMS.items() if known == name)]
    return repr(next((called for called in names if called in record), None) or " or ".join(names))


def _request(values: Mapping[str, Field]) -> dict[str, Any]:
    """Return the fields of a request, in which an answer may also be a number or a list of names."""
    fields = {name: field.content for name, field in values.items()}
    if "prompt" in values:
        fields["prompt"] = values["prompt"].text()
    fields |= {name: values[name].label() for name in ("subject", "relation") if name in values}
    fields |= {name: tuple(item.text() for item in values[name].items()) for name in _TEXTS if name in values}
    groups: list[Names] = []
    for name in ("target_new", "target_true"):
        if name in values:
            groups.append(values[name].answer())
            fields[name] = groups[-1][0]
    for name in _PAIRS:
        if name in values:
            pairs = [_pair(item) for item in values[name].items()]
            groups += [names for _, names in pairs]
            fields[name] = [(prompt, names[0]) for prompt, names in pairs]
    aliases = _groups(values["aliases"], fields["target_new"]) if "aliases" in values else []
    fields["aliases"] = [*(names for names in groups if len(names) > 1), *aliases]
    return fields


def _groups(aliases: Field, target_new: str) -> list[Names]:
    """Return groups of names of one thing. A list without groups has other names of the new answer."""
    items = aliases.items()
    if not any(isinstance(item.content, list | tuple) for item in items):
        return [(target_new, *(item.label() for item in items))] if items else []
    return [tuple(name.label() for name in group.items()) for group in items]


def _pair(item: Field) -> tuple[str, Names]:
    if isinstance(item.content, Mapping):
        return item["prompt"].text(), item.first("ground_truth", "answer").answer()
    if not isinstance(item.content, list | tuple) or len(item.content) != 2:
        raise item.error("must be a prompt and its answer")
    prompt, answer = (Field(part, f"{item.path}[{index}]") for index, part in enumerate(item.content))
    return prompt.text(), answer.answer()


def _meant(name: str) -> str | None:
    """Return the known field that a name misspells. A name such as `subject_id` is another field."""
    close = difflib.get_close_matches(name, [*FIELDS, *SYNONYMS], n=1, cutoff=0.7)
    if not close or name.startswith(f"{close[0]}_") or name.endswith(f"_{close[0]}"):
        return None
    return close[0]


FORMAT = Format("plain", "prompt, subject and target_new or target", matches, read)
