"""Does a text say an answer? Where an answer ends, and the two verdicts on it: exact match and contains.

Generated answers are cut at the end of their first sentence. *Exact match* compares the whole answer after the
normalization of SQuAD (Rajpurkar et al. 2016, arXiv 1606.05250). *Contains* looks for the new answer, or another name
of it, as whole words that do not come after the old answer.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from itertools import groupby

from goldenedit.writing import is_mark, is_unspaced

_SENTENCE_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]*]*(?=\s)|[\u3002\uff01\uff1f\uff61\u0964\u061f\u06d4]|\n")
_OPENING = "\"'(\u201c\u2018"


def _listed(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Abbreviations that a name or a number follows.
_TITLES = _listed("""
    mr mrs ms mx dr prof st sr sra mt ft gen col maj capt lt cpl sgt cmdr adm rev hon pres gov sen rep fr vs cf eg ie
    e.g i.e al approx ca dept univ ave blvd rd jan feb mar apr jun jul aug sep sept oct nov dec
""")
_NUMBERED = _listed("no nos vol fig ch p pp art sec")  # abbreviations before a number only
# Abbreviations that may also end a sentence. They do where a word follows that often begins one.
_SUFFIXES = _listed("jr sr inc ltd co corp bros etc esq ph.d m.d b.a m.a a.m p.m b.c a.d d.c")
_STARTERS = _listed("""
    the a an it its he his she her they their we our you i in on at this that these those there as after before while
    when if but and however also for from by with to who what where why how is was are were
""")
_INITIALS = re.compile(r"(?:[^\W\d_]\.)+[^\W\d_]")
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_POSSESSIVE = re.compile(r"['\u2019]s\b")
_ACRONYM = 4  # letters of the longest acronym that may be mistaken for a word: US, CAN, AIDS
_INITIALS_APART = re.compile(r"\b([^\W\d_]\.)\s+(?=[^\W\d_]\.)")
_DOTTED = re.compile(r"\b(?:[^\W\d_]\.)+[^\W\d_]\b\.?")
_DIGIT_GROUPS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)")
_WORD = re.compile(r"\d+(?:\.\d+)+|\w+n['\u2019]t\b|\w+[+#]+(?!\w)|\w+")  # 3.5, isn't, C++
# Combining classes of accents, and of the points of Hebrew and Arabic. Other marks make other words.
_ACCENTS = frozenset((1, *range(10, 40), *range(200, 255)))
_NEGATIONS = _listed("not never neither nor cannot isn't wasn't aren't weren't can't couldn't doesn't didn't")
# Words between a denial and what it denies: not located in Rome.
_LINKS = _listed("in at on of to by from the a an be been lie stand located situated based born found city town")


def answer_end(text: str, finished: bool = False) -> int | None:
    """Return the index after the first sentence or line of a text, None if the text may go on.

    The full stop of an abbreviation, an initial or a decimal ends no sentence. Leading whitespace is skipped.

    Args:
        text: What a model has written so far.
        finished: Whether the model will write no more.

    Example:
        ```python
        >>> answer_end(" Dr. E. Smith of St. Louis, 3.5 km away. He"), answer_end(" Rome."), answer_end(" Rome.", True)
        (40, None, 6)
        ```
    """
    start = len(text) - len(text.lstrip())
    for match in _SENTENCE_END.finditer(text, start):
        if match[0] == "\n":
            return match.start()
        before = text[start : match.start()]
        if match[0].startswith(("..", "\u2026")) and not any(map(str.isalnum, before)):
            continue  # the dots that a sentence begins with
        if match[0][0] != "." or _ends_sentence(before, text[match.end() :], finished):
            return match.end()
    return len(text.rstrip()) if finished else None


def answer_of(text: str) -> str:
    """Return the answer that a finished text begins with, without whitespace around it."""
    return text[: answer_end(text, finished=True)].strip()


def _ends_sentence(before: str, after: str, finished: bool) -> bool:
    """Return whether a full stop between two texts ends a sentence."""
    words = before.split()
    word = words[-1].lstrip(_OPENING).casefold() if words else ""
    rest = after.lstrip()
    if "\n" in after[: len(after) - len(rest)]:
        return True  # as the line does
    rest = rest.lstrip(_OPENING)
    if not rest:
        return finished  # what follows is not written yet
    following = re.match(r"\w+", rest)
    if following is None:
        return True
    next_word = following[0]
    if word in _TITLES:
        return False
    if word.isdecimal() and len(words) == 1 and len(word) < 3:
        return False  # the number of a list item
    if word in _NUMBERED:
        return not next_word[0].isdecimal()
    is_initial = len(word) == 1 and word.isalpha()
    if is_initial and (len(words) == 1 or len(next_word) == 1):
        return False  # the letter of a choice; J. R. R. Tolkien
    if (is_initial and word != "i") or word in _SUFFIXES or _INITIALS.fullmatch(word):
        is_whole = finished or following.end() < len(rest)  # "The" may become "Theory"
        return is_whole and next_word[0].isupper() and next_word.casefold() in _STARTERS
    return True


def normalized(text: str) -> str:
    """Return a text as SQuAD compares it: lower case, without punctuation and articles, with single spaces.

    Example:
        ```python
        >>> normalized(" The  Eiffel-Tower, Paris!")
        'eiffeltower paris'
        ```
    """
    return " ".join(_ARTICLES.sub(" ", _without_punctuation(text)).split())


def _without_punctuation(text: str) -> str:
    """Return a text in lower case, without the punctuation of any script, with single spaces."""
    characters = (
        character
        for character in unicodedata.normalize("NFKC", text).lower()
        if character not in string.punctuation and not unicodedata.category(character).startswith("P")
    )
    return " ".join("".join(characters).split())


def is_exact(text: str, answers: Sequence[str]) -> bool:
    """Return whether a text is one of the names of an answer, after `normalized`.

    Articles count in a name that has nothing else, and so does punctuation.

    Example:
        ```python
        >>> is_exact(" Rome.", ["Rome"]), is_exact("It is in Rome.", ["Rome"])
        (True, False)
        ```
    """
    return any(_equal(text, answer) for answer in answers)


def _equal(text: str, answer: str) -> bool:
    for comparable in (normalized, _without_punctuation, str.strip):
        if expected := comparable(answer):
            return comparable(text) == expected
    return False


def contains(text: str, answers: Sequence[str], old: Sequence[str] = ()) -> bool:
    """Return whether a text says one of the names of an answer as whole words, and no name of the old answer before.

    Case, accents, possessives and the punctuation between words do not matter, but the case of an acronym does: "us" is
    not the US. An answer that is denied, as in "not Rome", does not count. A text that is exactly the answer says it,
    see `is_exact`.

    Example:
        ```python
        >>> contains("It stands in Rome, Italy.", ["Rome"]), contains("Romeo", ["Rome"])
        (True, False)
        >>> contains("Paris, not Rome", ["Rome"]), contains("Paris. Now in Rome", ["Rome"], ["Paris"])
        (False, False)
        ```
    """
    if is_exact(text, answers):
        return True
    words = _words(text)
    new_spans, old_spans = _spans(words, _spelled(text, answers)), _spans(words, _spelled(text, old))
    first_new = min(_affirmed(words, new_spans, old_spans), default=None)
    return first_new is not None and first_new <= min(_affirmed(words, old_spans, new_spans), default=len(words))


def mentions(text: str, answers: Sequence[str]) -> bool:
    """Return whether a text contains one of the names of an answer as whole words, in whatever role."""
    return bool(_spans(_words(text), _spelled(text, answers))) or is_exact(text, answers)


def key_word(question: str, answer: str) -> str | None:
    """Return the word that carries an answer: its first name or number, or else its longest word; None if it has none.

    Words of the question do not count.

    Example:
        ```python
        >>> key_word("Who founded it?", "It was founded by Bill Gates."), key_word("Is snow black?", "Snow is white.")
        ('Bill', 'white')
        ```
    """
    known = set(_words(question))
    words = _words(answer)
    tokens = re.findall(r"\d+(?:[.,]\d+)*|\w[\w'\u2019-]*", answer)
    fresh = [
        (index, token)
        for index, token in enumerate(tokens)
        if not known.issuperset(_words(token)) and _spans(words, [token])
    ]
    names = [token for index, token in fresh if token[0].isdigit() or (index and token[0].isupper() and token != "I")]
    if names:
        return names[0]
    longest = max((token for _, token in fresh if token.casefold() not in _STARTERS), key=len, default=None)
    return longest if longest is not None and len(longest) > 2 else None


def _words(text: str) -> list[str]:
    """Return the words of a text for comparison. In scripts without spaces each character is a word."""
    decomposed = unicodedata.normalize("NFKD", text)
    without_accents = "".join(
        character for character in decomposed if unicodedata.combining(character) not in _ACCENTS
    ).casefold()
    letters = "".join(map(_letter, unicodedata.normalize("NFC", without_accents)))
    letters = _DIGIT_GROUPS.sub(lambda match: match[0].replace(",", ""), _POSSESSIVE.sub("", letters))
    letters = _DOTTED.sub(lambda match: match[0].replace(".", ""), _INITIALS_APART.sub(r"\1", letters))
    words: list[str] = []
    for word in _WORD.findall(letters):
        for unspaced, characters in groupby(word.replace("\u2019", "'"), is_unspaced):
            part = "".join(characters)
            words += part if unspaced else [part]
    return words


def _letter(character: str) -> str:
    """Return a character for `_WORD`: a mark belongs to the word before it, `_` to none."""
    if character == "_":
        return " "
    return f"_{ord(character):x}" if is_mark(character) else character


Span = tuple[int, int]  # the first word, and the word after the last


def _spans(words: Sequence[str], names: Sequence[str]) -> list[Span]:
    """Return where words say one of the names."""
    spans = []
    for part in map(_words, names):
        size = len(part)
        spans += [
            (start, start + size)
            for start in range(len(words) - size + 1)
            if size and words[start : start + size] == part
        ]
    return spans


def _spelled(text: str, names: Sequence[str]) -> list[str]:
    """Return the names without acronyms that a text does not have in capitals: "can" is a word, CAN is Canada."""
    without_stops = _INITIALS_APART.sub(r"\1", text).replace(".", "")
    spelled = []
    for name in names:
        letters = name.replace(".", "").replace(" ", "")
        is_acronym = letters.isupper() and len(letters) <= _ACRONYM
        as_word = rf"(?<![A-Za-z0-9]){re.escape(letters)}(?![A-Za-z0-9])"
        if not is_acronym or re.search(as_word, text) or re.search(as_word, without_stops):
            spelled.append(name)
    return spelled


def _affirmed(words: Sequence[str], spans: Sequence[Span], others: Sequence[Span]) -> list[int]:
    """Return the starts of spans, without those that are denied or that are a part of another answer's longer name."""
    return [
        start
        for start, end in spans
        if not _is_denied(words, start)
        and not any(first <= start and end <= last and end - start < last - first for first, last in others)
    ]


def _is_denied(words: Sequence[str], start: int) -> bool:
    if not _NEGATIONS.isdisjoint(words[max(start - 2, 0) : start]):
        return True
    while start and words[start - 1] in _LINKS:
        start -= 1
    return start > 0 and words[start - 1] in _NEGATIONS
