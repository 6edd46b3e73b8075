"""Locate the subject of a fact in a prompt or in messages."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from goldenedit.writing import is_mark, is_one_word, is_word

Message = dict[str, str]  # `role` and `content`

_POSSESSIVE = re.compile("['\u2019]s?$")
_ARTICLE = re.compile("the ", re.IGNORECASE)
_LEAST = 4  # letters of a subject that may be spelled in another way: "it" is not the film "It"
_ALIKE = {"\u2019": "'", "\u2018": "'", "\u201c": '"', "\u201d": '"', "\u2010": "-", "\u2011": "-", "\u2013": "-"}
_HANGUL = re.compile("[\uac00-\ud7a3]")  # Korean particles follow a word without a space


@dataclass(frozen=True)
class Place:
    """One occurrence of a subject in a text.

    Attributes:
        start: Index of its first character.
        rivals: Number of other occurrences that may be meant as well.
        whole: Whether the subject is a whole word or whole words there, not part of a longer word.
    """

    start: int
    rivals: int
    whole: bool

    @property
    def is_doubtful(self) -> bool:
        """Whether another occurrence may be meant."""
        return self.rivals > 0 or not self.whole


def find_subject(text: str, subject: str) -> Place | None:
    """Return the last occurrence of a subject as whole words, or else its last occurrence; None if it has none.

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
    """Return the start indices of a subject as whole words; if it only occurs inside longer words, those indices."""
    places = []
    start = text.find(subject)
    while start >= 0:
        places.append(start)
        start = text.find(subject, start + 1)
    whole = [start for start in places if _is_whole(text, start, start + len(subject))]
    return whole or places


def replace_subject(text: str, subject: str, other: str) -> str:
    """Return a text in which the subject is replaced by another one at all of its `subject_places`."""
    pieces, end = [], 0
    for start in subject_places(text, subject):
        if start >= end:  # occurrences may overlap
            pieces += [text[end:start], other]
            end = start + len(subject)
    return "".join([*pieces, text[end:]])


def template_place(prompt: str, subject: str) -> int:
    """Return the index of the `{}` that stands for the subject, or -1 if there is none.

    If the subject itself contains `{}` and is spelled out in the prompt, that `{}` does not count.
    """
    start = prompt.find("{}")
    spelled_out = subject_places(prompt, subject) if "{}" in subject else []
    while any(place <= start < place + len(subject) for place in spelled_out):
        start = prompt.find("{}", start + 2)
    return start


def subject_place(prompt: str, subject: str) -> Place | None:
    """Return where `{}` or the subject is in a prompt; None if the prompt contains neither."""
    start = template_place(prompt, subject)
    return find_subject(prompt, subject) if start < 0 else Place(start, rivals=0, whole=True)


def filled(prompt: str, subject: str) -> str:
    """Return a prompt in which `{}` is replaced by the subject."""
    start = template_place(prompt, subject)
    return prompt if start < 0 else prompt[:start] + subject + prompt[start + 2 :]


def message_place(messages: Sequence[Message], subject: str) -> tuple[int, Place] | None:
    """Return the index of the message with the subject, and the subject's place in it; None if no message has it.

    The last `{}` in a message of the user counts first. Otherwise the subject is located as in a prompt, over all
    messages.
    """
    for index, message in reversed(list(enumerate(messages))):
        if message["role"] == "user" and (start := template_place(message["content"], subject)) >= 0:
            return index, Place(start, rivals=0, whole=True)
    places = [(index, find_subject(message["content"], subject)) for index, message in enumerate(messages)]
    occurrences = [(index, place) for index, place in places if place is not None]
    best = [(index, place) for index, place in occurrences if place.whole] or occurrences
    if not best:
        return None
    index, place = best[-1]
    return index, replace(place, rivals=sum(other.rivals + 1 for _, other in best) - 1)


def filled_messages(messages: Sequence[Message], subject: str) -> list[Message]:
    """Return the messages, with `{}` replaced by the subject."""
    located = message_place(messages, subject)
    if located is None or messages[located[0]]["role"] != "user":
        return list(messages)
    index, message = located[0], messages[located[0]]
    return [*messages[:index], {**message, "content": filled(message["content"], subject)}, *messages[index + 1 :]]


def respelled_subject(texts: Iterable[str], subject: str) -> str | None:
    """Return the one place in texts that spells a subject in another way; None if there is none, or more than one.

    Case, accents, the shape of apostrophes and quotes, the width of spaces, a possessive ending and a leading "the" may
    differ. Only whole words count. A single word is the subject without its "the" only if it is spelled alike.

    Example:
        ```python
        >>> respelled_subject(["Where is the Eiffel  Tower?"], "The eiffel tower's")
        'the Eiffel  Tower'
        ```
    """
    texts = list(texts)
    plain = _POSSESSIVE.sub("", subject)
    for spelling in dict.fromkeys((subject, plain, _ARTICLE.sub("", subject, 1), _ARTICLE.sub("", plain, 1))):
        places = [place for text in texts for place in _respelled(text, spelling)]
        if spelling not in (subject, plain) and " " not in spelling:
            places = [place for place in places if place == spelling]  # a band is not The Band
        if places:
            return places[0] if len(places) == 1 else None
    return None


def nearest_text(texts: Iterable[str], subject: str) -> str | None:
    """Return the words in texts that are most like a subject, None if none are alike."""
    folded = _folded(subject)[0]
    count = len(subject.split())
    best, nearest = 0.7, None
    for text in texts:
        words = [match.span() for match in re.finditer(r"[^\s.,;:!?()]+", text)]
        for start, (begin, _) in enumerate(words):
            for _, end in words[max(start + count - 2, start) : start + count + 1]:
                likeness = difflib.SequenceMatcher(None, folded, _folded(text[begin:end])[0]).ratio()
                if likeness > best:
                    best, nearest = likeness, text[begin:end]
    return nearest


def _respelled(text: str, subject: str) -> list[str]:
    """Return the whole words of a text that spell a subject in another way."""
    folded_text, spans = _folded(text)
    folded = _folded(subject)[0].strip()
    places = []
    start = folded_text.find(folded) if len(folded) >= _LEAST else -1
    while start >= 0:
        begin, end = spans[start][0], spans[start + len(folded) - 1][1]
        if _is_whole(text, begin, end):
            places.append(text[begin:end])
        start = folded_text.find(folded, start + 1)
    return places


def _folded(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a text without case, accents and double spaces, and where each of its characters is in the text."""
    characters: list[str] = []
    spans: list[tuple[int, int]] = []
    for index, character in enumerate(text):
        character = " " if character.isspace() else _ALIKE.get(character, character)
        letters = [part for part in unicodedata.normalize("NFKD", character) if not unicodedata.combining(part)]
        if spans and (not letters or (character == " " and characters[-1] == " ")):
            spans[-1] = (spans[-1][0], index + 1)
            continue
        for folded in "".join(letters).casefold():
            characters.append(folded)
            spans.append((index, index + 1))
    return "".join(characters), spans


def _is_whole(text: str, start: int, end: int) -> bool:
    """Return whether `text[start:end]` consists of whole words."""
    before, after = text[start - 1 : start], text[end : end + 1]
    if is_mark(after) or is_mark(text[start]):
        return False  # a mark belongs to the letter before it
    if after in ("+", "#") and is_word(text[end - 1]):
        return False  # C in C++ and C# is not a whole word
    return not is_one_word(before, text[start]) and (
        bool(_HANGUL.match(after)) or not is_one_word(text[end - 1], after)
    )
