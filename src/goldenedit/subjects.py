"""Where the subject of a fact stands in the prompt, or in the messages, that ask for it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from goldenedit.writing import is_mark, is_one_word, is_word

Message = dict[str, str]  # `role` and `content`

_HANGUL = re.compile("[\uac00-\ud7a3]")  # particles follow a Korean word at once


@dataclass(frozen=True)
class Place:
    """Where a subject stands in a text.

    Attributes:
        start: Index of its first character.
        rivals: Number of other places that are as good.
        whole: Whether it stands there as a word of its own, not as a part of a longer one.
    """

    start: int
    rivals: int
    whole: bool

    @property
    def is_doubtful(self) -> bool:
        """Whether another place may be meant."""
        return self.rivals > 0 or not self.whole


def find_subject(text: str, subject: str) -> Place | None:
    """Return where a subject stands in a text: the last place as whole words, or else the last one; None without any.

    Example:
        ```python
        >>> find_subject("Java, unlike JavaScript, was created by", "Java").start
        0
        ```
    """
    places = subject_places(text, subject)
    if not places:
        return None
    return Place(places[-1], len(places) - 1, _is_whole(text, places[-1], places[-1] + len(subject)))


def subject_places(text: str, subject: str) -> list[int]:
    """Return all places where a subject stands as whole words; where there are none, those where it is a part."""
    places = []
    start = text.find(subject)
    while start >= 0:
        places.append(start)
        start = text.find(subject, start + 1)
    whole = [start for start in places if _is_whole(text, start, start + len(subject))]
    return whole or places


def replace_subject(text: str, subject: str, other: str) -> str:
    """Return a text with another subject in all of its `subject_places`."""
    pieces, end = [], 0
    for start in subject_places(text, subject):
        if start >= end:  # places may overlap
            pieces += [text[end:start], other]
            end = start + len(subject)
    return "".join([*pieces, text[end:]])


def template_place(prompt: str, subject: str) -> int:
    """Return the index of the `{}` that stands for the subject, -1 where there is none.

    A `{}` that is a part of the subject itself, spelled out in the prompt, stands for nothing.
    """
    start = prompt.find("{}")
    inside = subject_places(prompt, subject) if "{}" in subject else []
    while any(place <= start < place + len(subject) for place in inside):
        start = prompt.find("{}", start + 2)
    return start


def subject_place(prompt: str, subject: str) -> Place | None:
    """Return where a prompt has its subject or, in its stead, `{}`; None where it has neither."""
    start = template_place(prompt, subject)
    return find_subject(prompt, subject) if start < 0 else Place(start, rivals=0, whole=True)


def filled(prompt: str, subject: str) -> str:
    """Return a prompt with the subject in the place of `{}`."""
    start = template_place(prompt, subject)
    return prompt if start < 0 else prompt[:start] + subject + prompt[start + 2 :]


def message_place(messages: Sequence[Message], subject: str) -> tuple[int, Place] | None:
    """Return which message has the subject, and where: the last one with `{}` of the user's, or else as in a prompt."""
    for index, message in reversed(list(enumerate(messages))):
        if message["role"] == "user" and (start := template_place(message["content"], subject)) >= 0:
            return index, Place(start, rivals=0, whole=True)
    places = [(index, find_subject(message["content"], subject)) for index, message in enumerate(messages)]
    known = [(index, place) for index, place in places if place is not None]
    best = [(index, place) for index, place in known if place.whole] or known
    if not best:
        return None
    index, place = best[-1]
    return index, replace(place, rivals=sum(other.rivals + 1 for _, other in best) - 1)


def filled_messages(messages: Sequence[Message], subject: str) -> list[Message]:
    """Return messages with the subject in the place of `{}`."""
    found = message_place(messages, subject)
    if found is None or messages[found[0]]["role"] != "user":
        return list(messages)
    index, message = found[0], messages[found[0]]
    return [*messages[:index], {**message, "content": filled(message["content"], subject)}, *messages[index + 1 :]]


def _is_whole(text: str, start: int, end: int) -> bool:
    """Tell whether no word of a text begins before `start:end` and goes on in it, or goes on behind it."""
    before, behind = text[start - 1 : start], text[end : end + 1]
    if is_mark(behind) or is_mark(text[start]):
        return False  # a mark belongs to the letter before it
    if behind in ("+", "#") and is_word(text[end - 1]):
        return False  # C is no part of C++ and C#
    return not is_one_word(before, text[start]) and (
        bool(_HANGUL.match(behind)) or not is_one_word(text[end - 1], behind)
    )
