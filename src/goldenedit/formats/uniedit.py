"""UniEdit (Chen et al. 2025): `edit`, with prompts whose answers change (`generality`) or stay (`locality`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from goldenedit.formats.fields import Answered, Field, Format, Names, question_in, request_fields

# The reasoning path of a prompt that only rephrases the edit. A direction ("f" or "b") and a count ("s" or "m") follow.
_SAME_FACT = ["h_e", "r_e", "t_e"]
_YES_OR_NO = " The answer is (Yes/No):"  # the set's own code puts it behind a claim that two paths lead to one thing


def matches(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the format of UniEdit."""
    return isinstance(record.get("edit"), Mapping)


def read(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the fields of the request."""
    field = Field(record)
    edit = field["edit"]
    prompt = edit["prompt"].text()
    changed = _entries(field["generality"])
    rephrased = [entry for entry in changed if _is_rephrased(entry)]
    return [
        request_fields(
            prompt,
            edit["subject"].label(),
            tuple(dict.fromkeys((*edit["target"].answer(), *_aliases(edit["tail_entity"])))),
            portability=_pairs([entry for entry in changed if entry not in rephrased]),
            locality=_pairs(_entries(field["locality"])),
            paraphrases=tuple(map(_prompt, rephrased)),
            question=question_in(prompt),
        )
    ]


def _entries(field: Field) -> list[Field]:
    """Return the values of an object whose keys are numbers."""
    if field.is_missing:
        return []
    if not isinstance(field.content, Mapping):
        raise field.error("must be an object of prompts")
    return [field[name] for name in field.content if not field[name].is_missing]


def _is_rephrased(entry: Field) -> bool:
    """Return whether a prompt asks for the edited fact itself, in the edit's direction."""
    paths = entry["paths"].items()
    if len(paths) != 1 or entry["path_type"].content == "double":
        return False
    path = [step.text() for step in paths[0].items()]
    return path[:3] == _SAME_FACT and path[3:4] != ["b"]


def _prompt(entry: Field) -> str:
    prompt = entry["prompt"].text()
    return f"{prompt.rstrip()}{_YES_OR_NO}" if entry["path_type"].content == "double" else prompt


def _pairs(entries: list[Field]) -> list[Answered]:
    return [(_prompt(entry), entry["target"].answer()) for entry in entries]


def _aliases(entity: Field) -> Names:
    """Return other names of the target, which only an entity of Wikidata has."""
    if entity.is_missing or not isinstance(entity["value"].content, Mapping):
        return ()
    return entity["value"]["aliases"].texts()


FORMAT = Format("uniedit", "edit with prompt, subject and target", matches, read)
