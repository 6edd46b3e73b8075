"""Rules of writing: where words end, and whether a space is written between a prompt and its answer.

These rules do not depend on a tokenizer or a model.
"""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

# Thai, Lao, Tibetan, Burmese, Khmer, Chinese and Japanese have no spaces between words. Korean has.
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3000-\u312f\u31a0-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)
_UNSPACED_PUNCTUATION = re.compile("[\u3001-\u303f\u30fb\uff00-\uffef]")  # its width includes the space
_APOSTROPHES = "'\u2019"
_QUOTE_PAIRS = {"\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb", "\u2039": "\u203a"}
_GERMAN_PAIRS = {"\u201e": "\u201c", "\u201a": "\u2018", "\u00bb": "\u00ab", "\u203a": "\u2039"}
_OPENING = (*_QUOTE_PAIRS, *_GERMAN_PAIRS)
_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"  # hyphens, dashes and the minus sign
_NUMBER = re.compile(r"[+\-\u2212]?[.,]?\d")
_CUT_NUMBERS = {  # the end of a prompt, and the answer that continues its number; 1990, and the item "1." do not go on
    re.compile(r"[^\s.,:;] [^\w\s]?(?:\d{1,3}[.,])*\d{1,3}\.$"): re.compile(r"\d"),  # 3.14, 1,000.5 and 192.168.1.1
    re.compile(r"[^\s.,:;] [^\w\s]?(?:\d{1,3},)+$"): re.compile(r"\d{3}(?!\d)"),  # 1,000
    # 10:30 as in "at 10:30", but not "Question 10: 30".
    re.compile(r"(?:^|\s)(?:\w{1,2}|[^\WA-Z]\w*) \d{1,2}:$"): re.compile(r"[0-5]\d(?!\d)"),
}
_OPENING_TAG = re.compile(r"(?:^|[^\w<])<[A-Za-z][\w-]*(?: [^<>]*)?>$")
_CLOSING = re.compile(
    r"[,;:!?)\]}]"
    r"|</\w"
    r"|[.\u2026](?!\w)"  # not .NET and .5
    r"|[%\u2030](?!\w)"  # not %d
    rf"|[{_APOSTROPHES}](?:s|d|m|t|re|ve|ll)(?![\w-])(?!\s[A-Z])"  # Rome's and they're, not 's-Hertogenbosch, 't Hooft
    rf"|n[{_APOSTROPHES}]t\b"
)


def is_unspaced(character: str) -> bool:
    """Return whether a character belongs to a script that is written without spaces between words."""
    return bool(_UNSPACED.match(character))


def is_one_word(first: str, second: str) -> bool:
    """Return whether two adjacent characters belong to the same word."""
    return is_word(first) and is_word(second) and not (_UNSPACED.match(first) or _UNSPACED.match(second))


def is_word(character: str) -> bool:
    """Return whether a character can be part of a word: a letter, a digit, a mark or `_`."""
    return character.isalnum() or character == "_" or is_mark(character)


def is_mark(character: str) -> bool:
    """Return whether a character modifies the letter before it, such as a combining accent."""
    return bool(character) and unicodedata.category(character).startswith("M")


def joint_of(prompt: str, answer: str) -> str:
    """Return what people write between a prompt and its answer: a space or nothing.

    The result is empty in these cases:

    - the prompt ends with whitespace, or the answer begins with it;
    - the prompt ends with an opening bracket, quote or HTML tag, with a currency sign before a number, or with a slash,
      a hyphen or another character that ties words together;
    - the prompt ends inside a number that the answer continues, as in `3.` and `14`, or with `www.`;
    - the answer begins with closing punctuation;
    - prompt and answer are in scripts without spaces between words, such as Chinese, Japanese and Thai.
    """
    if not prompt:
        return " "
    if prompt[-1].isspace() or answer[:1].isspace():
        return ""
    is_tied = _ties(prompt, answer) or _is_closing(prompt, answer) or _are_unspaced(prompt, answer)
    return "" if is_tied else " "


def _are_unspaced(prompt: str, answer: str) -> bool:
    """Return whether prompt and answer meet in a script without spaces, ignoring quotes and brackets between them."""
    edges = prompt[-1], answer[:1]
    if any(_UNSPACED_PUNCTUATION.match(character) and not is_word(character) for character in edges):
        return True
    return all(_UNSPACED.match(_first_letter(text)) for text in (prompt[::-1], answer))


def _first_letter(text: str) -> str:
    """Return the first character that is not a quote, bracket or dash, or an empty string if there is none."""
    skipped_categories = ("Pi", "Pf", "Ps", "Pe", "Pd")
    for character in text:
        if unicodedata.category(character) not in skipped_categories and character not in "\"'\u2026\u00b7":
            return character
    return ""


def _ties(prompt: str, answer: str) -> bool:
    """Return whether the last character of a prompt is followed by the answer without a space."""
    last, before = prompt[-1], prompt[-2:-1]
    category = unicodedata.category(last)
    is_detached = not before or before.isspace()  # stands alone, such as the dash in "Rome - Paris"
    starts_with_number = bool(_NUMBER.match(answer))
    if category == "Sc":
        return starts_with_number
    if last in _DASHES:
        return starts_with_number if is_detached else True
    if last == "_":  # several in a row are a blank to fill in
        blank = re.search(r"(?:^|\s)_{2,}$", prompt)
        return blank is None
    if last == "#":
        return not is_word(before)  # "#1", but "C# was"
    if last == "=":
        return not is_detached
    if last == "*":
        return prompt.endswith("**") and prompt.count("**") % 2 == 1
    if last in ".,:":
        is_cut = any(end.search(prompt) and rest.match(answer) for end, rest in _CUT_NUMBERS.items())
        return is_cut or re.search(r"(?:^|\W)www\.$", prompt, re.IGNORECASE) is not None
    if last == ">":
        return _OPENING_TAG.search(prompt) is not None
    return category == "Ps" or last in "/\\@\u00bf\u00a1" or _is_opening_quote(prompt) or _is_elision(prompt)


def _is_opening_quote(prompt: str) -> bool:
    """Return whether a prompt ends with an opening quote."""
    last, before = prompt[-1], prompt[-2:-1]
    if last in ('"', "`"):
        return _has_open(prompt, last)
    if last == "'":  # usually an apostrophe, so the character before it decides
        return not before or before.isspace() or unicodedata.category(before) in ("Ps", "Pi", "Pd")
    return last in _OPENING and last in _open_quotes(prompt)[-1:]


def _is_elision(prompt: str) -> bool:
    """Return whether a prompt ends with an apostrophe inside a word, as in l'Italie or O'Brien, unlike the dogs'."""
    word = re.search(rf"(?:^|[^\w{_APOSTROPHES}])(\w+)[{_APOSTROPHES}]$", prompt)
    if word is None or _open_quotes(prompt[:-1])[-1:] == ["\u2018"]:
        return False
    return len(word[1]) == 1 or word[1][-1].lower() not in "sxz"


def _is_closing(prompt: str, answer: str) -> bool:
    """Return whether an answer begins with characters that follow the word before them without a space."""
    if _CLOSING.match(answer) or is_mark(answer[:1]):
        return True
    first = answer[:1]
    if first == '"':
        return _has_open(prompt, first)
    innermost = _open_quotes(prompt)[-1:]
    return any(first in (_QUOTE_PAIRS.get(quote), _GERMAN_PAIRS.get(quote)) for quote in innermost)


def _has_open(text: str, quote: str) -> bool:
    """Return whether a text opens a straight quote and does not close it; the inch mark in 12" opens none."""
    is_open = False
    for before, character in pairwise(f" {text}"):
        if character == quote and (is_open or not (quote == '"' and before.isdigit())):
            is_open = not is_open
    return is_open


def _open_quotes(text: str) -> list[str]:
    """Return the quotes that a text opens but does not close, the innermost last, in English or German style."""
    quotes: list[str] = []
    for index, character in enumerate(text):
        before, after = text[max(index - 1, 0) : index], text[index + 1 : index + 2]
        if quotes and character in (_QUOTE_PAIRS.get(quotes[-1]), _GERMAN_PAIRS.get(quotes[-1])):
            if character != "\u2019" or not after.isalpha():  # otherwise an apostrophe
                quotes.pop()
        elif character in _OPENING and not (character in _QUOTE_PAIRS.values() and is_word(before)):
            quotes.append(character)
    return quotes
