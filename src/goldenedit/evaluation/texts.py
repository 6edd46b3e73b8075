"""Packaged texts that have nothing to do with an edit: what an edited model is compared with its base model on."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any


def plain_texts() -> list[str]:
    """Return 64 passages of plain English prose, of 45 to 65 words, that any two models can be compared on.

    Example:
        ```python
        >>> len(plain_texts())
        64
        ```
    """
    return [record["text"] for record in _records("plain_texts.jsonl")]


def unrelated_questions() -> list[str]:
    """Return 40 short questions of everyday knowledge: none is about a person, a company or a work.

    Example:
        ```python
        >>> unrelated_questions()[0]
        'What color is a ripe banana?'
        ```
    """
    return [record["question"] for record in _records("unrelated_questions.jsonl")]


def passages() -> list[str]:
    """Return 4 passages of 45 to 60 words to put before a prompt as other text. None is one of `plain_texts()`.

    Example:
        ```python
        >>> passages()[0][:25]
        'The market opens at six, '
        ```
    """
    return [record["text"] for record in _records("passages.jsonl")]


def first_turn() -> list[dict[str, str]]:
    """Return a question of a user and its answer, to put before a question as an earlier turn of the conversation.

    Example:
        ```python
        >>> [message["role"] for message in first_turn()]
        ['user', 'assistant']
        ```
    """
    return _records("first_turn.jsonl")


def _records(name: str) -> list[dict[str, Any]]:
    text = (resources.files("goldenedit.data") / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]
