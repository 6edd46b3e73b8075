"""How people write: where the words of a text end, and what stands between a prompt and its answer.

Rules of writing alone: nothing here knows a tokenizer or a model.
"""

from __future__ import annotations

import re
import unicodedata

# Thai, Lao, Tibetan, Burmese, Khmer, Chinese and Japanese write no space between words. Korean does.
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u2e80-\u2fdf\u3000-\u312f\u31a0-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
)
_UNSPACED_PUNCTUATION = re.compile("[\u3001-\u303f\u30fb\uff00-\uffef]")  # with the space in it
_APOSTROPHES = "'\u2019"
_QUOTE_PAIRS = {"\u201c": "\u201d", "\u2018": "\u2019", "\u00ab": "\u00bb", "\u2039": "\u203a"}
_GERMAN_PAIRS = {"\u201e": "\u201c", "\u201a": "\u2018", "\u00bb": "\u00ab", "\u203a": "\u2039"}
_OPENING = (*_QUOTE_PAIRS, *_GERMAN_PAIRS)
_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"  # hyphens, dashes and the minus sign
_NUMBER = re.compile(r"[+\-\u2212]?[.,]?\d")
_CLOSING = re.compile(
    r"[,;:!?)\]}]"
    r"|[.\u2026](?!\w)"  # not .NET and .5
    r"|[%\u2030](?!\w)"  # not %d
    rf"|[{_APOSTROPHES}](?:s|d|m|t|re|ve|ll)(?![\w-])(?!\s[A-Z])"  # Rome's and they're, not 's-Hertogenbosch, 't Hooft
    rf"|n[{_APOSTROPHES}]t\b"
)


def is_unspaced(character: str) -> bool:
    """Tell whether a character is of a script that is written without spaces between words."""
    return bool(_UNSPACED.match(character))


def is_one_word(first: str, second: str) -> bool:
    """Tell whether two characters side by side are of one word."""
    return is_word(first) and is_word(second) and not (_UNSPACED.match(first) or _UNSPACED.match(second))


def is_word(character: str) -> bool:
    """Tell whether a character is of a word: a letter, a digit, a mark or `_`."""
    return character.isalnum() or character == "_" or is_mark(character)


def is_mark(character: str) -> bool:
    """Tell whether a character belongs to the letter before it, such as a combining accent."""
    return bool(character) and unicodedata.category(character).startswith("M")


def joint_of(prompt: str, answer: str) -> str:
    """Return what people write between a prompt and its answer: a space or nothing.

    Nothing stands where one of both brings whitespace of its own; behind an opening bracket or quote, a currency sign
    before a number, a slash, a hyphen and whatever else ties words together; before closing punctuation; and between
    words of scripts that are written without spaces, such as Chinese, Japanese and Thai.
    """
    if not prompt:
        return " "
    if prompt[-1].isspace() or answer[:1].isspace():
        return ""
    tied = _ties(prompt, answer) or _is_closing(prompt, answer) or _are_unspaced(prompt, answer)
    return "" if tied else " "


def _are_unspaced(prompt: str, answer: str) -> bool:
    """Tell whether prompt and answer meet in a script without spaces, with quotes and brackets between them or none."""
    if any(_UNSPACED_PUNCTUATION.match(one) and not is_word(one) for one in (prompt[-1], answer[:1])):
        return True
    return all(_UNSPACED.match(_first_letter(text)) for text in (prompt[::-1], answer))


def _first_letter(text: str) -> str:
    """Return the first character that is no quote, bracket or dash."""
    kinds = ("Pi", "Pf", "Ps", "Pe", "Pd")
    letters = (one for one in text if unicodedata.category(one) not in kinds and one not in "\"'\u2026\u00b7")
    return next(letters, "")


def _ties(prompt: str, answer: str) -> bool:
    """Tell whether the end of a prompt is written together with what follows."""
    last, before = prompt[-1], prompt[-2:-1]
    kind = unicodedata.category(last)
    free = not before or before.isspace()  # a sign of its own, such as the dash in "Rome - Paris"
    number = bool(_NUMBER.match(answer))
    if kind == "Sc":
        return number
    if last in _DASHES:
        return number if free else True
    if last == "_":  # a run of them is a blank to fill in
        blank = re.search(r"(?:^|\s)_{2,}$", prompt)
        return blank is None
    if last == "#":
        return not is_word(before)  # "#1", but "C# was"
    if last == "=":
        return not free
    if last == "*":
        return prompt.endswith("**") and prompt.count("**") % 2 == 1
    return kind == "Ps" or last in "/\\@\u00bf\u00a1" or _is_opening_quote(prompt) or _is_elision(prompt)


def _is_opening_quote(prompt: str) -> bool:
    """Tell whether a prompt ends with a quote that opens."""
    last, before = prompt[-1], prompt[-2:-1]
    if last in ('"', "`"):
        return prompt.count(last) % 2 == 1
    if last == "'":  # mostly an apostrophe: only its place tells
        return not before or before.isspace() or unicodedata.category(before) in ("Ps", "Pi", "Pd")
    return last in _OPENING and last in _open_quotes(prompt)[-1:]


def _is_elision(prompt: str) -> bool:
    """Tell whether an apostrophe cuts the last word of a prompt: of l'Italie and O'Brien, but not of the dogs'."""
    word = re.search(rf"(?:^|[^\w{_APOSTROPHES}])(\w+)[{_APOSTROPHES}]$", prompt)
    if word is None or _open_quotes(prompt[:-1])[-1:] == ["\u2018"]:
        return False
    return len(word[1]) == 1 or word[1][-1].lower() not in "sxz"


def _is_closing(prompt: str, answer: str) -> bool:
    """Tell whether an answer begins with what is written together with the word before it."""
    if _CLOSING.match(answer) or is_mark(answer[:1]):
        return True
    first = answer[:1]
    if first == '"':
        return prompt.count(first) % 2 == 1
    inner = _open_quotes(prompt)[-1:]
    return any(first in (_QUOTE_PAIRS.get(quote), _GERMAN_PAIRS.get(quote)) for quote in inner)


def _open_quotes(text: str) -> list[str]:
    """Return the quotes that a text opens and does not close, the innermost last; as in English or as in German."""
    opened: list[str] = []
    for index, one in enumerate(text):
        if opened and one in (_QUOTE_PAIRS.get(opened[-1]), _GERMAN_PAIRS.get(opened[-1])):
            if one != "\u2019" or not text[index + 1 : index + 2].isalpha():  # else an apostrophe
                opened.pop()
        elif one in _OPENING and not (one in _QUOTE_PAIRS.values() and is_word(text[max(index - 1, 0) : index])):
            opened.append(one)
    return opened
