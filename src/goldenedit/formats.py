"""The public formats of facts to edit, read into the fields of an `EditRequest`.

- CounterFact (Meng et al. 2022): `requested_rewrite`, with paraphrase, neighborhood and generation prompts.
- KnowEdit (Zhang et al. 2024): zsRE, WikiCounterfact and WikiRecent with `subject`, `prompt` and `target_new`; WikiBio
  with `concept`, `text` and `labels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Pair = tuple[str, str]


def is_counterfact(record: Mapping[str, Any]) -> bool:
    """Tell a record of CounterFact."""
    return "requested_rewrite" in record


def is_knowedit(record: Mapping[str, Any]) -> bool:
    """Tell a record of KnowEdit: its localities and portabilities are by kind, where requests have plain lists."""
    return "concept" in record or "ground_truth" in record or isinstance(record.get("locality"), Mapping)


def counterfact_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record of CounterFact.

    Raises:
        ValueError: A field is missing, or of the wrong kind.
    """
    rewrite = record["requested_rewrite"]
    try:
        return {
            "prompt": rewrite["prompt"],
            "subject": rewrite["subject"],
            "target_new": rewrite["target_new"]["str"],
            "target_true": rewrite["target_true"]["str"],
            "paraphrases": record.get("paraphrase_prompts", ()),
            "neighborhood": record.get("neighborhood_prompts", ()),
            "generation": record.get("generation_prompts", ()),
            "relation": rewrite.get("relation_id"),
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"A CounterFact record without {error}.") from error


def knowedit_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a record of KnowEdit; of several names of an answer the first is taken.

    An old answer that is the new one says nothing to compare with, and is left out.

    Raises:
        ValueError: A field is missing, or of the wrong kind.
    """
    bio = "concept" in record
    names = ("text", "concept", "labels") if bio else ("prompt", "subject", "target_new")
    if missing := [name for name in names if name not in record]:
        raise ValueError(f"A KnowEdit record without {missing[0]!r}.")
    prompt, subject, new = (record[name] for name in names)
    old = _answer("ground_truth", record.get("ground_truth"))
    rephrased = record.get("rephrase_prompt")
    return {
        "prompt": prompt,
        "subject": subject,
        "target_new": new,
        "target_true": None if old is None or (isinstance(new, str) and old.strip() == new.strip()) else old,
        "paraphrases": () if rephrased is None else (rephrased,),
        "portability": _pairs("portability", record.get("portability")),
        "locality": _pairs("locality", record.get("locality")),
    }


def _pairs(name: str, kinds: Any) -> tuple[Pair, ...]:
    """Return all prompts with their answers, whatever their kind; those without an answer are left out."""
    if kinds is None:
        return ()
    if not isinstance(kinds, Mapping):
        raise ValueError(f"KnowEdit's {name!r} must map kinds to lists, got {kinds!r}.")
    found = []
    for kind, entries in kinds.items():
        if entries is None:  # datasets fills in the kinds that other records have
            continue
        if not isinstance(entries, Sequence) or not all(isinstance(entry, Mapping) for entry in entries):
            raise ValueError(f"KnowEdit's {name}.{kind} must be a list of prompts with answers, got {entries!r}.")
        for entry in entries:
            prompt, answer = entry.get("prompt"), _answer(f"{name}.{kind}", entry.get("ground_truth"))
            if not isinstance(prompt, str):
                raise ValueError(f"KnowEdit's {name}.{kind} has a prompt that is no text: {prompt!r}.")
            if answer is not None:
                found.append((prompt, answer))
    return tuple(found)


def _answer(name: str, value: Any) -> str | None:
    """Return the first of the nested names of an answer, None where there is none."""
    while isinstance(value, Sequence) and not isinstance(value, str):
        value = next(iter(value), None)
    if not isinstance(value, str | None):
        raise ValueError(f"KnowEdit's {name} holds {value!r}, which is no answer.")
    return value if value and value.strip() else None
