"""Edit requests, each of which is one fact to change, and readers of files with many of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenedit.formats import Pair, format_named
from goldenedit.formats.fields import shortened
from goldenedit.formats.reading import read_facts, read_record
from goldenedit.records import broken_text, cut, records_of
from goldenedit.subjects import Message as Message
from goldenedit.subjects import (
    filled,
    filled_messages,
    find_subject,
    message_place,
    nearest_text,
    respelled_subject,
    subject_place,
)
from goldenedit.texts import Answer as Answer
from goldenedit.texts import ChatText as ChatText

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_TEXTS = ("prompts", "paraphrases", "neighborhood", "generation")  # fields with several texts
_PAIRS = ("portability", "locality")  # fields with prompts and their answers

_MANY = (*_TEXTS, *_PAIRS)
_SINGLE = ("target_true", "relation", "question")  # fields with one text or none
_LISTS = (*_MANY, "messages", "aliases")


@dataclass(frozen=True)
class EditRequest:
    """One fact to change: the edited model continues `prompt`, or answers `messages`, with `target_new`.

    Attributes:
        prompt: The text before the answer. It contains the subject, or `{}` in place of the subject. If the subject
            occurs several times and there is no `{}`, the last occurrence as a whole word is edited. If it only occurs
            as part of longer words, the last of these occurrences is edited.
        subject: The entity that the fact is about. Whitespace around it is removed. If the prompt spells it in another
            way, it becomes the text at that place (see `goldenedit.subjects.respelled_subject`).
        target_new: The new answer. It is joined to prompts by the usual rules of writing (see
            `goldenedit.writing.joint_of`). If it begins with whitespace, that is kept, and nothing is put before it.
        target_true: The old answer, if known. A blank one is none.
        paraphrases: Other prompts for the same fact. Here and in the other texts about the subject (`question`,
            `generation`, `portability`, `locality`), `{}` stands for it too.
        neighborhood: Prompts about other subjects, whose answers must not change. Their answer is `target_true`.
        relation: Name of the relation, for statistics.
        generation: Beginnings of texts about the subject. The edited model continues them to measure its fluency.
        portability: Prompts with answers that follow from the new fact.
        locality: Prompts with answers that are unrelated to the fact.
        messages: A conversation before the answer, instead of a prompt. Each message has `role` and `content`, and the
            model's chat template turns them into the prompt. The subject is located as in a prompt, but over all
            messages. In a message of the user, `{}` marks the place of the subject. All other prompts are then treated
            as messages of the user after the same system message.
        joint: What is put between prompts and both answers, if the usual rule is wrong; `""` joins them without a
            space.
        question: The fact as a question, such as "Where is the Eiffel Tower?". It need not contain the subject, and it
            stays plain text when a chat template renders the other prompts.
        prompts: Further prompts that are edited together with `prompt`, and teach the same fact in other words. Each
            contains the subject or `{}`. Without `prompt` and `messages`, the first of them becomes the prompt.
        aliases: Groups of names of one thing, for the answers of any prompt: `[["Rome", "Roma"], ["Italy", "Italia"]]`.
            A plain list of names, `["Roma"]`, has the other names of `target_new`. See `names_of`.

    Raises:
        ValueError: Both or neither of prompt and messages are given, the subject is not in them, a target is empty, the
            new answer equals the old one, or another field is of the wrong type.

    Example:
        ```python
        >>> EditRequest("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome").text
        'The Eiffel Tower is located in the city of'
        ```
    """

    prompt: str | None = None
    subject: str = ""
    target_new: str = ""
    target_true: str | None = None
    paraphrases: tuple[str, ...] = ()
    neighborhood: tuple[str, ...] = ()
    relation: str | None = None
    generation: tuple[str, ...] = ()
    portability: tuple[Pair, ...] = ()
    locality: tuple[Pair, ...] = ()
    messages: Sequence[Message] | None = field(default=None, hash=False)  # dicts have no hash
    joint: str | None = None
    question: str | None = None
    aliases: Sequence[Sequence[str]] | Sequence[str] = ()
    prompts: Sequence[str] = ()
    subject_start: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._take_first_prompt()
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("An EditRequest needs either a prompt or messages, but not both.")
        if isinstance(self.subject, str):  # with a trailing space, the next word would be edited
            object.__setattr__(self, "subject", self.subject.strip())
        for name in ("prompt", "subject", "target_new") if self.messages is None else ("subject", "target_new"):
            value = getattr(self, name)
            if not _is_text(value):
                raise ValueError(f"EditRequest.{name} must be a non-empty string, got {shortened(value)}.")
        if isinstance(self.target_true, str) and not self.target_true.strip():  # an empty cell of a table
            object.__setattr__(self, "target_true", None)
        for name in ("target_true", "relation"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"EditRequest.{name} must be a string or None, got {shortened(getattr(self, name))}.")
        if self.question is not None and not _is_text(self.question):
            raise ValueError(
                f"EditRequest.question must be a non-empty string or None, got {shortened(self.question)}."
            )
        self._check_characters()
        self._freeze_texts()
        self._freeze_aliases()
        self._check_messages()
        self._respell_subject()
        if self.target_true is not None and self.target_true.strip() == self.target_new.strip():
            raise ValueError(
                f"The new answer for {self.subject!r} equals the old one, {self.target_new!r}. Change the new "
                "answer, or leave out the old one."
            )
        self._mark_answers()
        self._fill_subject()
        self._check_prompts()
        object.__setattr__(self, "subject_start", self._find_subject())

    def _take_first_prompt(self) -> None:
        if self.prompt is None and self.messages is None and isinstance(self.prompts, list | tuple) and self.prompts:
            object.__setattr__(self, "prompt", self.prompts[0])
            object.__setattr__(self, "prompts", tuple(self.prompts[1:]))

    def _check_characters(self) -> None:
        for name, value in vars(self).items():
            if (broken := broken_text(value)) is not None:
                raise ValueError(f"EditRequest.{name}: {cut(broken)}")

    def _check_prompts(self) -> None:
        for prompt in self.prompts:
            if find_subject(prompt, self.subject) is None and respelled_subject([prompt], self.subject) is None:
                raise ValueError(
                    f"The subject {self.subject!r} is not in {prompt!r}, one of EditRequest.prompts. Spell it as "
                    "there, or put {} in its place."
                )

    def _mark_answers(self) -> None:
        if self.joint is None:
            return
        if not isinstance(self.joint, str) or self.joint.strip():
            raise ValueError(f"EditRequest.joint must be whitespace, '' or None, got {shortened(self.joint)}.")
        for name in ("target_new", "target_true"):
            if (answer := getattr(self, name)) is not None:
                object.__setattr__(self, name, self.joined(answer))

    def _find_subject(self) -> int:
        """Return the index of the subject in the prompt."""
        if self.prompt is None:
            return -1  # it depends on the chat template, see `goldenedit.lm.chat.rendered`
        if isinstance(self.prompt, ChatText):
            return self.prompt.subject_start
        place = subject_place(self.prompt, self.subject)
        assert place is not None  # otherwise `_respell_subject` raises an error
        return place.start

    def _respell_subject(self) -> None:
        """Spell the subject as in the prompt or in the messages."""
        if isinstance(self.prompt, ChatText):
            return
        if self.prompt is not None:
            texts, is_there = [self.prompt], subject_place(self.prompt, self.subject) is not None
        else:
            messages = self.messages or ()
            texts = [message["content"] for message in messages]
            is_there = message_place(messages, self.subject) is not None
        if is_there:
            return
        spelled = respelled_subject(texts, self.subject)
        if spelled is None:
            where = f"in none of the messages {texts!r}" if self.prompt is None else f"not in the prompt {texts[0]!r}"
            nearest = nearest_text(texts, self.subject)
            hint = "" if nearest is None else f" The nearest text there is {nearest!r}."
            raise ValueError(
                f"The subject {self.subject!r} is {where}.{hint} Spell it as there, or put {{}} in its place."
            )
        logger.info("The subject %r is spelled %r in %r, and is taken from there.", self.subject, spelled, texts)
        object.__setattr__(self, "subject", spelled)

    def _fill_subject(self) -> None:
        """Put the subject in place of `{}` in the other texts about it."""
        if "{}" in self.subject:
            return
        for name in ("prompts", "paraphrases", "generation"):
            object.__setattr__(self, name, tuple(self._with_subject(text) for text in getattr(self, name)))
        for name in _PAIRS:
            pairs = tuple((self._with_subject(prompt), answer) for prompt, answer in getattr(self, name))
            object.__setattr__(self, name, pairs)
        if self.question is not None:
            object.__setattr__(self, "question", self._with_subject(self.question))

    def _with_subject(self, text: str) -> str:
        return text if isinstance(text, ChatText) else text.replace("{}", self.subject)

    def _check_messages(self) -> None:
        messages = self.messages
        if messages is None:
            return
        if not isinstance(messages, list | tuple) or not messages:
            raise ValueError(f"EditRequest.messages must be a list of messages, got {shortened(messages)}.")
        messages = [_plain_message(message) for message in messages]
        if messages[-1]["role"] == "assistant":
            raise ValueError(
                "The last of EditRequest.messages is from the assistant. End with the message before the answer, and "
                "give the answer as target_new."
            )
        object.__setattr__(self, "messages", tuple(messages))

    def _freeze_texts(self) -> None:
        for name in _TEXTS:
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(map(_is_text, value)):
                raise ValueError(f"EditRequest.{name} must be a list of non-empty strings, got {shortened(value)}.")
            object.__setattr__(self, name, tuple(value))
        for name in _PAIRS:
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not all(
                isinstance(pair, list | tuple) and len(pair) == 2 and all(map(_is_text, pair)) for pair in value
            ):
                raise ValueError(f"EditRequest.{name} must be a list of (prompt, answer), got {shortened(value)}.")
            object.__setattr__(self, name, tuple(map(tuple, value)))

    def _freeze_aliases(self) -> None:
        value = self.aliases
        groups = value
        if isinstance(value, list | tuple) and value and all(map(_is_text, value)):
            groups = [[str(self.target_new), *map(str, value)]]
        if not isinstance(groups, list | tuple) or not all(
            isinstance(group, list | tuple) and all(map(_is_text, group)) for group in groups
        ):
            raise ValueError(
                "EditRequest.aliases must be a list of other names of target_new, or a list of groups of names of one "
                f"thing, got {shortened(value)}."
            )
        object.__setattr__(self, "aliases", tuple(tuple(group) for group in groups if group))

    @property
    def text(self) -> str:
        """The prompt with the subject filled in.

        Raises:
            ValueError: The request has messages, whose text depends on the model's chat template.
        """
        if self.prompt is None:
            raise ValueError(
                f"The request about {self.subject!r} has messages instead of a prompt. Render them with "
                "goldenedit.lm.chat.rendered(tokenizer, request)."
            )
        return self.prompt if isinstance(self.prompt, ChatText) else filled(self.prompt, self.subject)

    @property
    def asked(self) -> list[Message]:
        """The messages with the subject filled in; empty if the request has a prompt."""
        return filled_messages(self.messages or (), self.subject)

    @property
    def shown(self) -> str:
        """The prompt for display: a single message as its content, several messages with their roles."""
        if self.messages is None:
            return self.text
        if len(self.asked) == 1:
            return self.asked[0]["content"]
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.asked)

    @property
    def prompt_key(self) -> tuple[str, bool]:
        """What tells prompts apart: facts with the same prompt, or the same messages, replace each other."""
        return self.shown, self.messages is None

    @property
    def subject_end(self) -> int:
        """Index in `text` of the first character after the subject."""
        return self.subject_start + len(self.subject)

    @property
    def doubt(self) -> str | None:
        """A warning text if another occurrence of the subject than the edited one may be meant, otherwise None."""
        if isinstance(self.prompt, ChatText):
            return None
        if self.prompt is not None:
            text, place = self.prompt, subject_place(self.prompt, self.subject)
        else:
            index, place = message_place(self.messages or (), self.subject) or (0, None)
            text = (self.messages or ())[index]["content"]
        if place is None or not place.is_doubtful:
            return None
        end = place.start + len(self.subject)
        excerpt = f"{text[max(place.start - 40, 0) : place.start]}[{self.subject}]{text[end : end + 20]}"
        reason = f"occurs {place.rivals + 1} times in" if place.rivals else "is only part of a longer word in"
        return (
            f"The subject {self.subject!r} {reason} {self.shown!r}. This occurrence is edited: '{excerpt}'. To edit "
            "another one, write {} in its place."
        )

    def joined(self, answer: str) -> str:
        """Return another answer to the same prompts that is joined to them like the answers of this request."""
        return answer if self.joint is None else Answer(answer, self.joint)

    def names_of(self, answer: str) -> tuple[str, ...]:
        """Return an answer and all its other names, from the groups of `aliases` that contain it.

        Case and outer whitespace do not matter. The answer comes first, as it is spelled here.

        Example:
            ```python
            >>> request = EditRequest("The Colosseum is in", "The Colosseum", "Rome", aliases=["Roma", "Eternal City"])
            >>> request.names_of("rome")
            ('rome', 'Roma', 'Eternal City')
            ```
        """
        names = {_folded(answer): answer}
        for group in self.aliases:
            if _folded(answer) in map(_folded, group):
                for name in group:
                    names.setdefault(_folded(name), name)
        return tuple(names.values())

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON values."""
        record = {
            name: [list(item) if isinstance(item, tuple) else item for item in value] if name in _LISTS else value
            for name, value in asdict(self).items()
            if name != "subject_start" and value not in (None, ())
        }
        return {name: str(value) if isinstance(value, Answer) else value for name, value in record.items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditRequest:
        """Read a record with the fields of a request, or in a public format (see `load_requests`).

        Raises:
            ValueError: A field is missing, unknown or invalid, or the record has several facts.
        """
        facts = read_record(record)
        if len(facts) > 1:
            raise ValueError(f"The record has {len(facts)} facts. Read it with load_requests([record]).")
        return cls(**facts[0])


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _folded(name: str) -> str:
    return name.strip().casefold()


Facts = EditRequest | Mapping[str, Any] | Iterable[EditRequest | Mapping[str, Any]]  # one fact or several


def load_requests(
    source: str | Path | Dataset | Facts | Any,
    format: str = "auto",
    split: str = "train",
    skip_bad: bool = False,
) -> list[EditRequest]:
    """Read facts from a file, a dataset on the Hub, a `datasets.Dataset`, a pandas DataFrame, or dicts.

    Records are in the format of this library (the fields of `EditRequest`), or in that of CounterFact, KnowEdit, zsRE,
    EasyEdit, WikiBigEdit, QAEdit, MQuAKE, RippleEdits, UniEdit or HalluEditBench. A record of MQuAKE may give several
    requests. The formats are told by their fields.

    Args:
        source: A file (`.json`, `.jsonl`, `.csv` or `.tsv`), the name of a dataset, or the records themselves.
        format: Name of the format of all records, such as `counterfact`, instead of the one that the fields tell.
        split: Split of a dataset on the Hub.
        skip_bad: Whether to leave out records that cannot be read. A warning tells how many, and why the first ones.

    Raises:
        ValueError: Records cannot be read, or there are none. The message names the file, the line or index of the
            first such records, and the field.
        FileNotFoundError: There is no file and no dataset of that name.

    Example:
        ```python
        >>> [request] = load_requests([{"prompt": "The Louvre is in", "subject": "The Louvre", "target": "Rome"}])
        >>> request.target_new
        'Rome'
        ```
    """
    form = None if format == "auto" else format_named(format)
    name = str(source) if isinstance(source, str | Path) else ""
    requests = read_facts(EditRequest, records_of(source, split), name, form, skip_bad)
    if not requests:
        raise ValueError(f"{name or 'The source'} has no facts. Add at least one.")
    return requests


def as_requests(facts: Facts) -> list[EditRequest]:
    """Return one or several facts as requests. Each is an `EditRequest`, or a record that `load_requests` reads.

    Raises:
        ValueError: A fact is neither an `EditRequest` nor a valid record.
    """
    if isinstance(facts, EditRequest):
        return [facts]
    if isinstance(facts, str):
        raise ValueError(f"A fact must be an EditRequest or a mapping, got {facts!r}. Read files with load_requests.")
    return read_facts(EditRequest, records_of(facts))


def distinct(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Return the requests without duplicates, that is, requests with the same prompt or messages and the same answer.

    The first of several keeps its fields. What it lacks, and further paraphrases and other prompts, come from the
    later ones.

    Raises:
        ValueError: Two requests have different answers to the same prompt.
    """
    by_prompt: dict[tuple[str, bool, str], list[EditRequest]] = {}
    for request in requests:
        equal = by_prompt.setdefault((*request.prompt_key, request.subject), [])
        if equal and equal[0].target_new.strip() != request.target_new.strip():
            raise ValueError(
                f"Two requests contradict each other: {request.shown!r} -> {equal[0].target_new!r} and -> "
                f"{request.target_new!r}. Remove one of them."
            )
        equal.append(request)
    return [equal[0] if len(equal) == 1 else _united(equal) for equal in by_prompt.values()]


def _united(requests: Sequence[EditRequest]) -> EditRequest:
    """Return the first of equal requests, with the fields and the further prompts of the others."""
    first = requests[0]
    values = {name: [getattr(request, name) for request in requests] for name in (*_SINGLE, *_MANY, "aliases")}
    fields: dict[str, Any] = {
        name: next((value for value in values[name] if value is not None), None) for name in _SINGLE
    }
    for name in (*_MANY, "aliases"):
        fields[name] = tuple(dict.fromkeys(item for items in values[name] for item in items))
    changed = {name: value for name, value in fields.items() if value != getattr(first, name)}
    return replace(first, **changed) if changed else first


def proxy_facts() -> list[EditRequest]:
    """Return the packaged proxy set: the facts that layer selectors use unless the user gives others."""
    with resources.as_file(resources.files("goldenedit.data") / "proxy_facts.jsonl") as path:
        return load_requests(path)


def _plain_message(message: Any) -> Message:
    """Return a message with its content as one text; those of OpenAI's API may have a list of parts, and empty fields.

    Raises:
        ValueError: It has no text, or more than texts.
    """
    if not isinstance(message, Mapping):
        raise ValueError(
            f"Each of EditRequest.messages must have a non-empty role and content, got {shortened(message)}."
        )
    content = message.get("content")
    fields = {
        name: value for name, value in message.items() if name == "content" or value not in (None, "", [], {}, ())
    }
    if isinstance(content, list | tuple):
        kinds = [part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__ for part in content]
        if foreign := [kind for kind in kinds if kind not in ("text", "input_text", "output_text")]:
            raise ValueError(
                f"A message of EditRequest.messages has a part of type {foreign[0]!r}. Edits read text alone."
            )
        texts = [part.get("text") for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"A part of a message of EditRequest.messages has no text, got {shortened(message)}.")
        fields["content"] = "".join(texts)
    if further := sorted(set(fields) - {"role", "content", "name"}):
        raise ValueError(f"A message of EditRequest.messages has {further}. Give role, content and, if needed, name.")
    may_be_empty = ("content",) if fields.get("role") == "system" else ()  # it replaces a template's own
    for name in ("role", "content", "name"):
        text = fields.get(name, "a" if name == "name" else None)
        if not isinstance(text, str) or not (text.strip() or name in may_be_empty):
            raise ValueError(
                f"Each of EditRequest.messages must have a non-empty role and content, got {shortened(message)}."
            )
    return fields
