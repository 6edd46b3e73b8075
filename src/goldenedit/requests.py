"""What a user asks for: one fact to change, and readers of files that hold many."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

from goldenedit.formats import (
    Pair,
    counterfact_fields,
    is_counterfact,
    is_knowedit,
    knowedit_fields,
)
from goldenedit.records import Record, read_records
from goldenedit.subjects import Message as Message
from goldenedit.subjects import filled, filled_messages, message_place, subject_place

_TEXTS = ("paraphrases", "neighborhood", "generation")  # fields with several texts
_PAIRS = ("portability", "locality")  # fields with prompts and their answers

_MANY = (*_TEXTS, *_PAIRS)
_LISTS = (*_MANY, "messages")


class ChatText(str):
    """A prompt that a chat template wrote: it brings its special tokens, and the answer follows as the template has it.

    Attributes:
        joint: What the template puts before an answer: a space or nothing.
        subject_start: Index of the first character of the subject, -1 in a prompt without one.
        context_start: Index of the message with the subject in it, where contexts go.
    """

    joint: str
    subject_start: int
    context_start: int

    def __new__(cls, text: str, joint: str = "", subject_start: int = -1, context_start: int = -1) -> ChatText:
        """Make a text of a template; see the attributes."""
        made = super().__new__(cls, text)
        made.joint, made.subject_start, made.context_start = joint, subject_start, context_start
        return made


class Answer(str):
    """An answer that says itself what stands between a prompt and it.

    Attributes:
        joint: Whitespace, or nothing.
    """

    joint: str

    def __new__(cls, text: str, joint: str = "") -> Answer:
        """Make an answer; see the attribute."""
        answer = super().__new__(cls, text)
        answer.joint = joint
        return answer


@dataclass(frozen=True)
class EditRequest:
    """One fact to change: the model shall continue `prompt`, or answer `messages`, with `target_new`.

    Attributes:
        prompt: The text before the answer, with the subject in it, or with `{}` in the subject's place. Where the
            subject stands in it more than once and there is no `{}`, the last place is edited where it is a word of
            its own, or else the last one where it is part of a word.
        subject: The entity the fact is about, as spelled in the prompt; whitespace around it is dropped.
        target_new: The new answer. It is joined to prompts as people write (see `goldenedit.writing.joint_of`); white
            space at its beginning is kept, and nothing is put before it.
        target_true: The old answer, where known.
        paraphrases: Other prompts for the same fact.
        neighborhood: Prompts about other subjects, whose answers must stay; `target_true` is right for them.
        relation: A name of the relation, for statistics.
        generation: Beginnings of texts about the subject, for the fluency of what the edited model goes on with.
        portability: Prompts with the answers that follow from the new fact.
        locality: Prompts with answers that have nothing to do with it.
        messages: In a prompt's stead, a conversation that the answer follows, each message with `role` and `content`:
            the model's chat template makes the prompt. The subject's place is found as in a prompt, over all messages;
            a `{}` is its place in messages of the user. All other prompts are then questions of a user behind the same
            system message.
        joint: What stands between prompts and both answers, where the rule is wrong: `""` joins them without a space.

    Raises:
        ValueError: There is neither prompt nor messages or both, the subject is not in them, or a target is empty or
            equal to the old answer.

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
    subject_start: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("An EditRequest needs a prompt or messages, and not both.")
        if isinstance(self.subject, str):  # with a space behind it the next word would be edited
            object.__setattr__(self, "subject", self.subject.strip())
        for name in ("prompt", "subject", "target_new") if self.messages is None else ("subject", "target_new"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f"EditRequest.{name} must be a text that is not empty, got {value!r}.")
        for name in ("target_true", "relation"):
            if not isinstance(getattr(self, name), str | None):
                raise ValueError(f"EditRequest.{name} must be a text or None, got {getattr(self, name)!r}.")
        self._freeze_texts()
        self._freeze_messages()
        if self.target_true is not None and self.target_true.strip() == self.target_new.strip():
            raise ValueError(
                f"The new answer for {self.subject!r} is the old one, {self.target_new!r}: there is nothing to edit."
            )
        self._mark_answers()
        object.__setattr__(self, "subject_start", self._find_subject())

    def _mark_answers(self) -> None:
        if self.joint is None:
            return
        if not isinstance(self.joint, str) or self.joint.strip():
            raise ValueError(f"EditRequest.joint must be whitespace, '' or None, got {self.joint!r}.")
        for name in ("target_new", "target_true"):
            if (answer := getattr(self, name)) is not None:
                object.__setattr__(self, name, self.joined(answer))

    def _find_subject(self) -> int:
        """Return the index of the subject in the prompt."""
        if self.prompt is None:
            return -1  # a tokenizer tells, see `goldenedit.lm.chat.rendered`
        if isinstance(self.prompt, ChatText):
            return self.prompt.subject_start
        place = subject_place(self.prompt, self.subject)
        if place is None:
            raise ValueError(
                f"The subject {self.subject!r} is not in the prompt {self.prompt!r}. Spell it as the prompt does, or "
                "put {} in its place."
            )
        return place.start

    def _freeze_messages(self) -> None:
        messages = self.messages
        if messages is None:
            return
        if not isinstance(messages, list | tuple) or not messages:
            raise ValueError(f"EditRequest.messages must be a list of messages, got {messages!r}.")
        for message in messages:
            if (
                not isinstance(message, Mapping)
                or set(message) != {"role", "content"}
                or not all(isinstance(text, str) and text.strip() for text in message.values())
            ):
                raise ValueError(f"Each of EditRequest.messages must have role and content, texts, got {message!r}.")
        if messages[-1]["role"] == "assistant":
            raise ValueError(
                "The last of EditRequest.messages is the assistant's own: end with the message that it answers; the "
                "answer is target_new."
            )
        if message_place(messages, self.subject) is None:
            raise ValueError(
                f"The subject {self.subject!r} is in no message of {list(messages)!r}. Spell it as a message does, or "
                "put {} in its place in a message of the user."
            )
        object.__setattr__(self, "messages", tuple(dict(message) for message in messages))

    def _freeze_texts(self) -> None:
        for name in _TEXTS:
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(item, str) for item in value):
                raise ValueError(f"EditRequest.{name} must be a list of texts, got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        for name in _PAIRS:
            value = getattr(self, name)
            pairs = [] if isinstance(value, str) else [tuple(pair) for pair in value if isinstance(pair, list | tuple)]
            if len(pairs) != len(value) or not all(
                len(pair) == 2 and all(isinstance(text, str) and text.strip() for text in pair) for pair in pairs
            ):
                raise ValueError(f"EditRequest.{name} must be a list of (prompt, answer), got {value!r}.")
            object.__setattr__(self, name, tuple(pairs))

    @property
    def text(self) -> str:
        """The prompt with the subject in it; that of messages depends on the model, see `goldenedit.lm.chat.rendered`.

        Raises:
            ValueError: The request has messages.
        """
        if self.prompt is None:
            raise ValueError(
                f"The request about {self.subject!r} has messages, which a tokenizer makes a text of: take "
                "goldenedit.lm.chat.rendered(tokenizer, request)."
            )
        return self.prompt if isinstance(self.prompt, ChatText) else filled(self.prompt, self.subject)

    @property
    def asked(self) -> list[Message]:
        """The messages with the subject in them, none where there is a prompt."""
        return filled_messages(self.messages or (), self.subject)

    @property
    def shown(self) -> str:
        """The prompt for people to read: of messages what the user asks, or all of them where there are several."""
        if self.messages is None:
            return self.text
        if len(self.asked) == 1:
            return self.asked[0]["content"]
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.asked)

    @property
    def subject_end(self) -> int:
        """Index in `text` of the first character behind the subject."""
        return self.subject_start + len(self.subject)

    @property
    def doubt(self) -> str | None:
        """Why another place of the subject than the edited one may be meant, and what tells them apart; or None."""
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
        taken = f"{text[max(place.start - 40, 0) : place.start]}[{self.subject}]{text[end : end + 20]}"
        why = f"is in {place.rivals + 1} places of" if place.rivals else "is only a part of a word in"
        return (
            f"The subject {self.subject!r} {why} {self.shown!r}. This one is edited: '{taken}'. Write {{}} instead of "
            "the subject in the place that you mean."
        )

    def joined(self, answer: str) -> str:
        """Return another answer to the same prompts, to be joined to them as those of the request are."""
        return answer if self.joint is None else Answer(answer, self.joint)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON has them."""
        record = {
            name: [list(item) if isinstance(item, tuple) else item for item in value] if name in _LISTS else value
            for name, value in asdict(self).items()
            if name != "subject_start" and value not in (None, ())
        }
        return {name: str(value) if isinstance(value, Answer) else value for name, value in record.items()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> EditRequest:
        """Read a record of this library, of CounterFact, or of KnowEdit (see `goldenedit.formats`).

        Raises:
            ValueError: A field is missing, unknown or of the wrong kind.
        """
        if not isinstance(record, Mapping):
            raise ValueError(f"A request must have named fields, got {record!r}.")
        if is_counterfact(record):
            return cls(**counterfact_fields(record))
        if is_knowedit(record):
            return cls(**knowedit_fields(record))
        known = {"prompt", "messages", "subject", "target_new", "target_true", "relation", "joint", *_MANY}
        if unknown := sorted(set(record) - known):
            raise ValueError(f"Unknown fields {unknown}; a request has {sorted(known)}.")
        needed = {"messages" if "messages" in record else "prompt", "subject", "target_new"}
        if missing := sorted(needed - set(record)):
            raise ValueError(f"Missing fields {missing}.")
        return cls(**record)


Facts = EditRequest | Mapping[str, Any] | Iterable[EditRequest | Mapping[str, Any]]  # what stands for requests


def load_requests(path: str | Path, split: str = "train") -> list[EditRequest]:
    """Read requests from a file, or from a dataset of the Hub.

    Args:
        path: A JSON or JSON-lines file in this library's form, CounterFact's or KnowEdit's; or a dataset's name, with
            such records.
        split: Split of the dataset.

    Raises:
        ValueError: A record cannot be read; the message names the file, the record (its line, or its index) and the
            field.
        FileNotFoundError: There is neither a file nor a dataset of that name.
    """
    requests = []
    for record in _records(path, split):
        try:
            requests.append(EditRequest.from_dict(record.content))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, {record.place}: {error}") from error
    return requests


def _records(name: str | Path, split: str) -> Iterator[Record]:
    """Yield the records of a file, or the rows of a dataset."""
    path = Path(name)
    if isinstance(name, str) and not path.is_file() and path.suffix not in (".json", ".jsonl"):
        from datasets import load_dataset

        yield from (Record(row, f"record {index}") for index, row in enumerate(load_dataset(name, split=split)))
        return
    yield from read_records(path)


def as_requests(given: Facts) -> list[EditRequest]:
    """Return the requests of one fact or several, each an `EditRequest` or a record that `from_dict` reads.

    Raises:
        ValueError: One of them is neither, or a record means nothing.
    """
    some = [given] if isinstance(given, EditRequest | Mapping | str) else given
    return [one if isinstance(one, EditRequest) else EditRequest.from_dict(one) for one in some]


def distinct(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """Return the requests, those that ask for the same answer to the same prompt or messages once.

    Raises:
        ValueError: Two requests give one prompt different answers.
    """
    found: dict[tuple[str, bool, str], EditRequest] = {}
    for request in requests:
        other = found.setdefault((request.shown, request.messages is None, request.subject), request).target_new
        if other.strip() != request.target_new.strip():
            raise ValueError(
                f"Two requests contradict each other: {request.shown!r} -> {other!r} and -> {request.target_new!r}."
            )
    return list(found.values())


def proxy_facts() -> list[EditRequest]:
    """Return the packaged proxy set: the facts on which layers are compared when a user names none."""
    with resources.as_file(resources.files("goldenedit.data") / "proxy_facts.jsonl") as path:
        return load_requests(path)
