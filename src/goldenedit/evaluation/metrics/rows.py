"""From rows, one per prompt, to facts with the values of their prompts by kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def by_fact(facts: Sequence[int], kinds: Sequence[str], values: Iterable[Any], known: Sequence[str]) -> list[Any]:
    """Return, for each fact in order of appearance, the values of its rows by kind.

    Raises:
        ValueError: A kind is unknown, or a fact does not have exactly one row of kind `rewrite`.
    """
    values_of: dict[int, dict[str, list[Any]]] = {}
    for fact, kind, value in zip(facts, kinds, values, strict=True):
        if kind not in known:
            raise ValueError(f"Unknown kind {kind!r} of a prompt. Use one of {list(known)}.")
        values_of.setdefault(fact, {name: [] for name in known})[kind].append(value)
    for fact, rows in values_of.items():
        if len(rows["rewrite"]) != 1:
            raise ValueError(f"Fact {fact} has {len(rows['rewrite'])} rows of kind 'rewrite'. Give it exactly one.")
    return list(values_of.values())
