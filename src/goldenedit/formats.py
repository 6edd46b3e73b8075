"""Convert records of public datasets of facts to the fields of an `EditRequest`.

- CounterFact (Meng et al. 2022): `requested_rewrite`, with paraphrase, neighborhood and generation prompts.
- KnowEdit (Zhang et al. 2024): zsRE, WikiCounterfact and WikiRecent with `subject`, `prompt` and `target_new`; WikiBio
  with `concept`, `text` and `labels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Pair = tuple[str, str]


def is_counterfact(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the format of CounterFact."""
    return "requested_rewrite" in record


def is_knowedit(record: Mapping[str, Any]) -> bool:
    """Return whether a record is in the format of KnowEdit, which groups locality and portability by kind."""
    return "concept" in record or "ground_truth" in record or isinstance(record.get("locality"), Mapping)


def counterfact_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an `EditRequest` for a record of CounterFact.

    Raises:
        ValueError: A field is missing or invalid.
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
    except KeyError as error:
        raise ValueError(f"The CounterFact record has no field {error}.") from error
    except TypeError as error:
        raise ValueError(f"The CounterFact record has a field of the wrong type ({error}).") from error


def knowedit_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an `EditRequest` for a record of KnowEdit.

    If an answer has several names, the first is used. An old answer that equals the new one is left out, because there
    is nothing to compare.

    Raises:
        ValueError: A field is missing or invalid.
    """
    is_biography = "concept" in record
    names = ("text", "concept", "labels") if is_biography else ("prompt", "subject", "target_new")
    if missing := [name for name in names if name not in record]:
        raise ValueError(f"The KnowEdit record has no field {missing[0]!r}.")
    prompt, subject, target_new = (record[name] for name in names)
    target_true = _answer("ground_truth", record.get("ground_truth"))
    if target_true is not None and isinstance(target_new, str) and target_true.strip() == target_new.strip():
        target_true = None
    rephrased = record.get("rephrase_prompt")
    return {
        "prompt": prompt,
        "subject": subject,
        "target_new": target_new,
        "target_true": target_true,
        "paraphrases": () if rephrased is None else (rephrased,),
        "portability": _pairs("portability", record.get("portability")),
        "locality": _pairs("locality", record.get("locality")),
    }


def _pairs(name: str, kinds: Any) -> tuple[Pair, ...]:
    """Return the prompts and answers of all kinds; prompts without an answer are left out."""
    if kinds is None:
        return ()
    if not isinstance(kinds, Mapping):
        raise ValueError(f"KnowEdit's {name!r} must map kinds to lists, got {kinds!r}.")
    pairs = []
    for kind, entries in kinds.items():
        if entries is None:  # the library `datasets` adds the kinds of other records
            continue
        if not isinstance(entries, Sequence) or not all(isinstance(entry, Mapping) for entry in entries):
            raise ValueError(f"KnowEdit's {name}.{kind} must be a list of prompts with answers, got {entries!r}.")
        for entry in entries:
            prompt, answer = entry.get("prompt"), _answer(f"{name}.{kind}", entry.get("ground_truth"))
            if not isinstance(prompt, str):
                raise ValueError(f"KnowEdit's {name}.{kind} has a prompt that is not a string: {prompt!r}.")
            if answer is not None:
                pairs.append((prompt, answer))
    return tuple(pairs)


def _answer(name: str, value: Any) -> str | None:
    """Return the first of the (possibly nested) names of an answer, or None if it has none."""
    while isinstance(value, Sequence) and not isinstance(value, str):
        value = next(iter(value), None)
    if not isinstance(value, str | None):
        raise ValueError(f"KnowEdit's {name} must contain an answer, got {value!r}.")
    return value if value and value.strip() else None
