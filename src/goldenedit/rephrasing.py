"""Other wordings of a fact, from a packaged list: "X is a citizen of" is also "Which country is X from?".

A text is looked up, not analyzed: it has to be one of the listed patterns of a property, up to case, articles, tense,
the possessive and the order of question and statement. Every other text is unknown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources

from goldenedit.questions import question_from

_SUBJECT = "{}"
_SAME = {
    "are": "is", "was": "is", "were": "is", "did": "does", "do": "does", "have": "has", "had": "has",
    "which": "what", "whom": "who", "an": "a",
}  # fmt: skip
_FILLERS = frozenset(["the", "current", "currently", "presently"])
_PREPOSITIONS = frozenset(["in", "on", "at", "by", "for", "from", "of", "to", "with", "over", "under", "after", "as"])
_PAST = re.compile(r"\b(?:was|were|did|had|worked|lived|resided|spoke|used to|held the|played the)\b", re.IGNORECASE)
_PRESENT = re.compile(  # a verb without a past in `_AS_PAST`: "The person who runs {} is", "Who runs {}?"
    r"(?:^who|[a-z] (?:who|that|one)|\{\}|^(?:which|what|whose) [a-z]+) "
    r"(?!(?:is|was|has|does|as|its)\b)[a-z]+(?<!s)s\b|\bcan\b",
    re.IGNORECASE,
)
_PLURAL = re.compile(r"\b(?:are|were|have|do)$", re.IGNORECASE)
_PLURAL_AFTER = re.compile(r"(?:are|were|have)\b", re.IGNORECASE)
_AS_PAST = {"is": "was", "are": "were", "does": "did", "do": "did", "has": "had", "have": "had"}
_AS_PLURAL = {"is": "are", "was": "were", "does": "do", "has": "have"}
_RELATIVE = frozenset(["that", "which", "whom", "where", "when"])
_OPENING, _CLOSING = '"\u201c', '"\u201d'
# What may follow a question: "What sport does X play? They play".
_ANSWERED = re.compile(r"\?\s+(?:it is(?: located)?(?: in)?|they play(?: as)?|(?:the )?answer is)$", re.IGNORECASE)
_TIME = re.compile(
    r"\b(?:1\d{3}s?|20\d{2}s?|\d{1,2}(?:st|nd|rd|th) century|january|february|march \d+|april|may \d+|june|july|august|"
    r"september|october|november|december)\b|^\d{3}s?$",
    re.IGNORECASE,
)
_LANGUAGE_NAMES = """
    afrikaans akkadian albanian amharic arabic aramaic armenian azerbaijani basque belarusian bengali bosnian breton
    bulgarian burmese cantonese catalan chinese coptic corsican croatian czech danish dutch english esperanto estonian
    faroese finnish french frisian galician georgian german greek guarani gujarati hausa hawaiian hebrew hindi
    hungarian icelandic igbo indonesian irish italian japanese javanese kannada kazakh khmer korean kurdish kyrgyz lao
    latin latvian lithuanian luxembourgish macedonian malagasy malay malayalam maltese mandarin maori marathi
    mongolian nahuatl nepali norwegian occitan pali pashto persian polish portuguese provencal punjabi quechua
    romanian romansh russian samoan sanskrit scots serbian sinhala slovak slovene slovenian somali sotho spanish
    sumerian sundanese swahili swedish syriac tagalog tajik tamil tatar telugu thai tibetan tigrinya turkish turkmen
    ukrainian urdu uyghur uzbek vietnamese welsh xhosa yiddish yoruba zulu
"""
_LANGUAGES = frozenset(_LANGUAGE_NAMES.split())


@dataclass(frozen=True)
class Rephrasings:
    """Other texts that ask for the same property of a subject.

    Attributes:
        relation: The property.
        questions: Questions of a user.
        statements: Beginnings of sentences that the answer ends.
    """

    relation: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]


@dataclass(frozen=True)
class Property:
    """A line of the packaged list; `{}` stands for the subject.

    Attributes:
        relation: Name of the property.
        patterns: Texts that ask for it. `(a|b)` is one of several words, `[a|b]` one or none of them.
        questions: Questions of a user.
        statements: Beginnings of sentences that the answer ends.
        answer: What the answer has to be where a pattern leaves it open: `"time"`, `"language"` or `"any"`, which is
            everything but a time.
    """

    relation: str
    patterns: tuple[str, ...]
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    answer: str = "any"


def rephrased(text: str, start: int, end: int, answer: str | None = None) -> Rephrasings | None:
    """Return other texts about the property that a text asks for, or None where it is not listed.

    The text itself and the question that `goldenedit.questions.question_from` makes of it are left out.

    Args:
        text: A statement before the answer, or a question.
        start: Index of the first character of the subject.
        end: Index of the first character after the subject.
        answer: The new answer. It tells whether a text such as "Nokia was founded in" is about a time or a place;
            without it, such a text is unknown.

    Example:
        ```python
        >>> found = rephrased("Ellie Kemper is a citizen of", 0, 12)
        >>> found.questions[0]
        'Which country is Ellie Kemper from?'
        >>> found.statements[0]
        'The nationality of Ellie Kemper is'
        >>> rephrased("Nokia was founded in", 0, 5) is None
        True
        >>> rephrased("Nokia was founded in", 0, 5, answer="1865").questions[0]
        'When was Nokia founded?'
        >>> rephrased("Ellie Kemper is a citizen of the world because", 0, 12) is None
        True
        ```
    """
    before, name, after = _around(text, start, end)
    entry = _chosen(_frame(before, after), answer)
    if entry is None:
        return None
    is_plural = bool(_PLURAL.search(before.rstrip()) if before else _PLURAL_AFTER.match(after.lstrip()))
    is_plural = is_plural and not after.startswith("'")
    is_past = bool(_PAST.search(f"{before} {after}"))

    def filled(templates: tuple[str, ...]) -> tuple[str, ...]:
        inflected = [_inflected(template, is_past, is_plural) for template in templates]
        return tuple(_filled(template, name) for template in inflected if template is not None)

    own = [text, question_from(text, start, end) or ""]
    return without(Rephrasings(entry.relation, filled(entry.questions), filled(entry.statements)), own)


def without(rephrasings: Rephrasings, texts: Iterable[str]) -> Rephrasings:
    """Return rephrasings without those that another text equals or ends with, up to case, articles and punctuation.

    Args:
        rephrasings: The rephrasings.
        texts: Texts that are not to be trained on, such as those that evaluate an edit.

    Example:
        ```python
        >>> found = Rephrasings("capital", ("Which city is the capital of Peru?", "What is Peru's capital?"), ())
        >>> without(found, ["Facts about Peru. which city is capital of Peru"]).questions
        ("What is Peru's capital?",)
        ```
    """
    forbidden = [f" {_plain(text)}" for text in texts]

    def allowed(candidates: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(text for text in candidates if not any(other.endswith(f" {_plain(text)}") for other in forbidden))

    return replace(rephrasings, questions=allowed(rephrasings.questions), statements=allowed(rephrasings.statements))


@cache
def properties() -> tuple[Property, ...]:
    """Return the packaged properties."""
    text = (resources.files("goldenedit.data") / "rephrasings.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.split("\n") if line]
    return tuple(
        Property(
            relation=record["relation"],
            patterns=tuple(record["patterns"]),
            questions=tuple(record["questions"]),
            statements=tuple(record["statements"]),
            answer=record.get("answer", "any"),
        )
        for record in records
    )


def expanded(pattern: str) -> list[str]:
    """Return the texts that a pattern stands for.

    Example:
        ```python
        >>> expanded("{} die[d|s] in")
        ['{} died in', '{} dies in', '{} die in']
        ```
    """
    choice = re.search(r"([\[(])([^\[\]()]*)[\])]", pattern)
    if choice is None:
        return [" ".join(pattern.split())]
    options = [*choice[2].split("|"), *([""] if choice[1] == "[" else [])]
    texts = [pattern[: choice.start()] + option + pattern[choice.end() :] for option in options]
    return list(dict.fromkeys(found for text in texts for found in expanded(text)))


@cache
def _by_frame() -> dict[str, tuple[Property, ...]]:
    """Return the properties that a text may ask for, by what stands around its subject."""
    found: dict[str, dict[Property, None]] = {}
    for entry in properties():
        for pattern in entry.patterns:
            for text in expanded(pattern):
                before, after = text.split(_SUBJECT)
                found.setdefault(_frame(before, after), {})[entry] = None
    return {frame: tuple(entries) for frame, entries in found.items()}


def _around(text: str, start: int, end: int) -> tuple[str, str, str]:
    """Return what is before a subject, the subject with its article and quotation marks, and what is after it."""
    if text[:start].endswith(tuple(_OPENING)) and text[end:].startswith(tuple(_CLOSING)):
        start, end = start - 1, end + 1
    article = re.search(r"(?:^|(?<=\s))the\s+$", text[:start], re.IGNORECASE)
    start = start if article is None else article.start()
    name = " ".join(text[start:end].split())
    name = re.sub("^The (?=[A-Z])", "the ", name) if article is None else f"the {name[4:]}"
    return text[:start], name, text[end:].replace("\u2019", "'")


def _frame(before: str, after: str) -> str:
    """Return what stands around a subject in one form for all texts that differ in case, articles, tense and order.

    A question for a thing and the statement that answers it have one form: "author of {} is".
    """
    if not (before + after).isascii() or (before and not before[-1].isspace()) or after[:1].isalnum():
        return ""
    text = _ANSWERED.sub("?", f"{before}{_SUBJECT}{after}".casefold().strip())
    text = text.removesuffix("?").removesuffix(":").rstrip()
    text = re.sub(r"\{\}'s?(?=\s)", "{} 's", text).replace(",", " , ")
    words = text.split()
    if not all(re.fullmatch("[a-z]+(?:[-'][a-z]+)*", word) or word in (_SUBJECT, "'s", ",") for word in words):
        return ""
    words = [_SAME.get(word, word) for word in words if word not in _FILLERS]
    last = len(words) - 1
    words = [word for index, word in enumerate(words) if word != "a" or index == last]
    words = ["what" if word == "that" and index else word for index, word in enumerate(words)]
    words = re.sub(r"\bnames? of (?!\{\}(?! 's))", "", " ".join(words)).split()
    if len(words) > 2 and words[0] in _PREPOSITIONS and words[1] in ("what", "who"):
        words = [*words[1:], *([words[0]] if words[-1] != words[0] else [])]
    if words[:2] in (["what", "is"], ["who", "is"]):
        words = [*words[2:], "is"]
    elif words[-2:] in (["is", "what"], ["is", "who"]):
        words = words[:-1]
    if words[:2] == [_SUBJECT, "'s"] and words[-1] == "is":
        words = [*words[2:-1], "of", _SUBJECT, "is"]
    return " ".join(words)


def _chosen(frame: str, answer: str | None) -> Property | None:
    """Return the property that a text asks for, or None if there is none or more than one."""
    entries = _by_frame().get(frame, ())
    is_open = frame.rpartition(" ")[2] in _PREPOSITIONS  # "founded in" a year or a place
    if answer is not None and is_open:
        entries = tuple(entry for entry in entries if _fits(entry, answer.strip()))
    elif is_open and any(entry.answer != "any" for entry in entries):
        return None
    return entries[0] if len(entries) == 1 else None


def _fits(entry: Property, answer: str) -> bool:
    is_time = bool(_TIME.search(answer))
    return is_time == (entry.answer == "time") and (entry.answer != "language" or answer.casefold() in _LANGUAGES)


def _inflected(template: str, is_past: bool, is_plural: bool) -> str | None:
    """Return a template for a text in the past or about a plural subject; None if it has a verb of another tense."""
    words = template.removesuffix("?").split()
    if is_past:
        if _PRESENT.search(template):
            return None
        auxiliary = next((index for index, word in enumerate(words) if word in ("do", "does", "did")), None)
        if auxiliary is None or not template.endswith("?"):
            words = [_AS_PAST.get(word, word) for word in words]
        else:  # "What did {} do", "What did {} have"
            words[auxiliary] = "did"
    if is_plural and _SUBJECT in words:
        place = words.index(_SUBJECT)
        words = ["their" if word == "its" else word for word in words]
        if place and words[place - 1] in _AS_PLURAL:  # "Where is {}"
            words[place - 1] = _AS_PLURAL[words[place - 1]]
        elif place == 0 or words[place - 1] in _RELATIVE:
            verb = words[place + 1]
            words[place + 1] = _AS_PLURAL.get(verb) or re.sub("(?<=ch)es$|(?<=o)es$|s$", "", verb)
    return " ".join(words) + ("?" if template.endswith("?") else "")


def _filled(template: str, name: str) -> str:
    """Return a template with the subject in it."""
    if re.search(r"\bthe \{\}", template, re.IGNORECASE):
        name = re.sub("^the ", "", name)
    possessive = f"{name}'" if name.endswith("s") else f"{name}'s"
    text = re.sub(r"\{\}('s)?", lambda place: possessive if place[1] else name, template)
    return f"The {text[4:]}" if text.startswith("the ") else text


def _plain(text: str) -> str:
    """Return a text in lower case, without punctuation and articles, with single spaces."""
    words = re.sub(r"[^\w\s]", "", text.casefold()).split()
    return " ".join(word for word in words if word not in ("a", "an", "the"))
