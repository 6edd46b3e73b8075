"""Fields of records: texts, answers with several names, and lists of prompts, each checked where it is."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

Pair = tuple[str, str]
Names = tuple[str, ...]  # all names of one answer, the first of which is used
Answered = tuple[str, Names]  # a prompt with its answer

_CODE = re.compile("[a-z]{2}")
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 2, 80, 80


class Format(NamedTuple):
    """One format of records.

    Attributes:
        name: Its name for `load_requests(format=...)`.
        needs: The fields that tell it from other formats, for people.
        matches: Returns whether a record is in this format.
        read: Returns the fields of one or several `EditRequest`s for a record. It raises a ValueError that names the
            field that cannot be used.
    """

    name: str
    needs: str
    matches: Callable[[Mapping[str, Any]], bool]
    read: Callable[[Mapping[str, Any]], list[dict[str, Any]]]


def shortened(value: Any) -> str:
    """Return the representation of a value, cut if it is long."""
    return _SHORT.repr(value)


@dataclass(frozen=True)
class Field:
    """A value of a record, and where it is.

    Attributes:
        content: The value; None if the record has no such field.
        path: Its name, such as `locality[0].prompt`.
    """

    content: Any
    path: str = ""

    def __getitem__(self, name: str) -> Field:
        if not isinstance(self.content, Mapping):
            raise self.error(f"must be an object with the field {name!r}")
        return Field(self.content.get(name), f"{self.path}.{name}" if self.path else name)

    @property
    def is_missing(self) -> bool:
        """Whether there is no value: None, NaN, an empty text or an empty list."""
        content = self.content
        if isinstance(content, str):
            return not content.strip()
        return content is None or _is_nan(content) or (isinstance(content, Sequence | Mapping) and not content)

    def error(self, need: str) -> ValueError:
        """Return an error that says what the field needs."""
        if self.is_missing:
            return ValueError(f"The field {self.path!r} is missing or empty. Add it.")
        return ValueError(f"The field {self.path!r} {need}, got {shortened(self.content)}.")

    def first(self, *names: str) -> Field:
        """Return the first of several fields that has a value; if none has, the first field."""
        fields = [self[name] for name in names]
        return next((field for field in fields if not field.is_missing), fields[0])

    def items(self) -> list[Field]:
        """Return the items of a list; those without a value are left out."""
        if self.is_missing:
            return []
        if not isinstance(self.content, list | tuple):
            raise self.error("must be a list")
        items = [Field(item, f"{self.path}[{index}]") for index, item in enumerate(self.content)]
        return [item for item in items if not item.is_missing]

    def text(self) -> str:
        """Return a text."""
        if self.is_missing or not isinstance(self.content, str):
            raise self.error("must be a text")
        return self.content

    def optional_text(self) -> str | None:
        """Return a text, or None if there is none."""
        return None if self.is_missing else self.text()

    def texts(self) -> tuple[str, ...]:
        """Return the texts of a list, or a single text."""
        if isinstance(self.content, list | tuple):
            return tuple(item.text() for item in self.items())
        return () if self.is_missing else (self.text(),)

    def label(self) -> str:
        """Return a text, or a number as a text."""
        return str(self.content) if _is_number(self) else self.text()

    def names(self) -> Names:
        """Return all names of an answer, or nothing if it has none.

        An answer is a text, a number, a list of its names, or an object with `str` or `value`, and `aliases`. Of a list
        of lists, which has several answers, the first answer counts.
        """
        field = self
        while isinstance(field.content, list | tuple):
            items = field.items()
            if all(not isinstance(item.content, list | tuple | Mapping) for item in items):
                return tuple(dict.fromkeys(item.label() for item in items))
            field = items[0]
        if isinstance(field.content, Mapping) and field.content:
            value = field.first("str", "value")
            others = field["aliases"].texts()
            return tuple(dict.fromkeys((value.label(), *others)))
        return () if field.is_missing else (field.label(),)

    def answer(self) -> Names:
        """Return all names of an answer that must be there."""
        names = self.names()
        if not names:
            raise self.error("must contain an answer")
        return names

    def pairs(self, prompt: str = "prompt", answer: str = "ground_truth") -> list[Answered]:
        """Return the prompts and answers of a list of objects; prompts without an answer are left out.

        Args:
            prompt: The field of the prompts.
            answer: The field of the answers.
        """
        entries = self.items() if isinstance(self.content, list | tuple) else self._rows(prompt, answer)
        pairs = [(entry[prompt].text(), entry[answer].names()) for entry in entries]
        return [(text, names) for text, names in pairs if names]

    def _rows(self, prompt: str, answer: str) -> list[Field]:
        """Return the objects of a single object, which may have lists in its fields, as `datasets` stores them."""
        if self.is_missing:
            return []
        if not isinstance(self.content, Mapping):
            raise self.error(f"must be a list of objects with {prompt!r} and {answer!r}")
        if not isinstance(self.content.get(prompt), list | tuple):
            return [self]
        prompts, answers = self[prompt], self[answer]
        if not isinstance(answers.content, list | tuple) or len(answers.content) != len(prompts.content):
            raise answers.error(f"must be a list as long as {prompts.path!r}")
        rows = zip(prompts.content, answers.content, strict=True)
        return [Field({prompt: text, answer: names}, f"{self.path}[{row}]") for row, (text, names) in enumerate(rows)]

    def kinds(self) -> list[Answered]:
        """Return the prompts and answers of an object that groups them by kind."""
        if self.is_missing:
            return []
        if not isinstance(self.content, Mapping):
            raise self.error("must be an object that groups prompts by kind")
        return [pair for kind in self.content for pair in self[kind].pairs()]


def request_fields(
    prompt: str,
    subject: str,
    target_new: Names,
    target_true: Names = (),
    portability: Sequence[Answered] = (),
    locality: Sequence[Answered] = (),
    aliases: Sequence[Names] = (),
    **others: Any,
) -> dict[str, Any]:
    """Return the fields of an `EditRequest`: the first name of each answer, and the groups of names.

    Old answers of which one equals the new answer are left out: there is nothing to compare, and a set that lists
    several answers of a fact would make the others names of the new one.
    """
    target_true = () if is_among(target_new[0], target_true) else target_true
    answers = [names for _, names in (*portability, *locality)]
    groups = [_without_codes(names) for names in (target_new, target_true, *aliases, *answers) if names]
    groups = [names for names in groups if len(names) > 1]
    return {
        "prompt": prompt,
        "subject": subject,
        "target_new": target_new[0],
        "target_true": target_true[0] if target_true else None,
        "portability": tuple((text, names[0]) for text, names in portability),
        "locality": tuple((text, names[0]) for text, names in locality),
        "aliases": tuple(dict.fromkeys(groups)),
        **others,
    }


def _without_codes(names: Names) -> Names:
    """Return names without the codes of countries and languages that Wikidata has: "is" is a word, and not Iceland."""
    return (names[0], *(name for name in names[1:] if not _CODE.fullmatch(name)))


def is_among(answer: str, names: Names) -> bool:
    """Return whether an answer is one of the names, whatever the case and the spaces around it."""
    return answer.strip().casefold() in {name.strip().casefold() for name in names}


def question_in(prompt: str) -> str | None:
    """Return a prompt that is a question, or None."""
    return prompt if prompt.rstrip().endswith(("?", "\uff1f", "\u061f")) and "{}" not in prompt else None


def _is_nan(value: Any) -> bool:
    """Return whether a value is NaN, or pandas' NA, which is neither equal to itself nor unequal."""
    try:
        return bool(value != value)
    except TypeError:
        return True
    except ValueError:  # an array
        return False


def _is_number(field: Field) -> bool:
    return isinstance(field.content, Real) and not isinstance(field.content, bool) and not field.is_missing
