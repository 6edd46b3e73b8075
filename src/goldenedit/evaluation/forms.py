r"""The forms in which a fact is asked: what people type when they want to know it.

A form is left out where a fact has no text for it. Texts are never made up, only wrapped: a question becomes
`Q: ...\nA:`, the message of a user, or a prompt behind other text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from goldenedit.evaluation.texts import first_turn, passages
from goldenedit.lm.chat import conversation
from goldenedit.lm.tokens import is_rendered, with_answer
from goldenedit.registry import meant
from goldenedit.requests import EditRequest, Message

FORMS = {
    "completion": "the edited prompt",
    "rephrase": "other prompts for the same fact",
    "question": "`Q: {question}\\nA:`",
    "chat": "the question, or the prompt, as a user's message in the chat template",
    "second_turn": "the same after a turn about something else",
    "prefix": "the edited prompt behind some fifty words of other text",
    "negation": "the edited prompt with 'not': the base model's share is that of the old answer",
    "portability": "prompts whose answer follows from the new fact",
}
_QUESTION_MARKS = ("?", "\uff1f")
_AUXILIARY = re.compile(r"\b(?:is|are|was|were|can|could|will|would|(?:has|have|had)(?= been\b))\b")
_NEGATIVE = re.compile(r"\b(?:not|no|never|none|neither|nor|nobody|nothing|cannot)\b|n['\u2019]t\b", re.IGNORECASE)


@dataclass(frozen=True)
class Asked:
    """One text that asks for a fact.

    Attributes:
        fact: The fact's number among those that are evaluated.
        form: One of `FORMS`.
        prompt: What the model reads.
        informed: The same behind the new fact as a sentence.
        question: What a judge is shown.
        answers: The answer that the edited model should give, or not give in the form "negation", and its other names.
        old: The old answer and its other names; empty if it is not known.
    """

    fact: int
    form: str
    prompt: str
    informed: str
    question: str
    answers: tuple[str, ...]
    old: tuple[str, ...]


def check_forms(forms: Sequence[str]) -> tuple[str, ...]:
    """Return the forms in the order of `FORMS`.

    Raises:
        ValueError: There is no such form.
    """
    names = [forms] if isinstance(forms, str) else list(forms)
    if unknown := [name for name in names if name not in FORMS]:
        raise ValueError(f"There is no form {unknown[0]!r}.{meant(unknown[0], FORMS)} The forms are {list(FORMS)}.")
    return tuple(form for form in FORMS if form in names)


def asked_forms(
    tokenizer: PreTrainedTokenizerBase, requests: Sequence[EditRequest], forms: Sequence[str] = tuple(FORMS)
) -> list[Asked]:
    """Return the texts that ask for facts in these forms, fact by fact.

    Forms of a chat need a tokenizer with a chat template, and are left out without one.

    Raises:
        ValueError: There is no such form, or the chat template refuses a fact's messages.
    """
    chosen = check_forms(forms)
    return [asked for index, request in enumerate(requests) for asked in _asked(tokenizer, index, request, chosen)]


def question_of(request: EditRequest) -> str | None:
    """Return the fact as a question, None if the request has none."""
    if request.question is not None:
        return request.question
    last = request.asked[-1]["content"] if request.messages is not None else request.text
    return last if last.rstrip().endswith(_QUESTION_MARKS) else None


def negated(request: EditRequest) -> str | None:
    """Return the edited prompt with "not" behind its verb, None where that is not certain.

    Example:
        ```python
        >>> negated(EditRequest("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome"))
        'The Eiffel Tower is not located in the city of'
        ```
    """
    if request.messages is not None or request.text.rstrip().endswith(_QUESTION_MARKS):
        return None
    around = f"{request.text[: request.subject_start]} {request.text[request.subject_end :]}"
    verbs = [
        verb
        for verb in _AUXILIARY.finditer(request.text)
        if not request.subject_start <= verb.start() < request.subject_end
    ]
    # A verb before the subject begins a question or a clause about something else.
    if len(verbs) != 1 or verbs[0].start() < request.subject_end or _NEGATIVE.search(around):
        return None
    end = verbs[0].end()
    return f"{request.text[:end]} not{request.text[end:]}"


def fact_sentence(request: EditRequest) -> str:
    """Return the new fact as a sentence, as a user would put it into a prompt.

    Example:
        ```python
        >>> fact_sentence(EditRequest("The Eiffel Tower is located in the city of", "The Eiffel Tower", "Rome"))
        'The Eiffel Tower is located in the city of Rome.'
        ```
    """
    shown = request.asked[-1]["content"] if request.messages is not None else request.text
    sentence = str(with_answer(str(shown), request.target_new)).strip()
    return sentence if sentence.endswith((".", "!", "\u3002", *_QUESTION_MARKS)) else f"{sentence}."


@dataclass(frozen=True)
class _Wording:
    """A text that asks for a fact, as a plain prompt or as messages."""

    form: str
    text: str | Sequence[Message]
    answers: tuple[str, ...]

    def prompt(self, tokenizer: PreTrainedTokenizerBase, fact: str = "") -> str:
        """Return what the model reads, behind a fact."""
        if isinstance(self.text, str):
            between = "\n\n" if self.text.startswith("Q: ") else " "
            return f"{fact}{between}{self.text}" if fact else self.text
        messages = [dict(message) for message in self.text]
        if fact:
            first = next((message for message in messages if message["role"] == "user"), messages[-1])
            first["content"] = f"{fact} {first['content']}"
        return conversation(tokenizer, messages)

    @property
    def question(self) -> str:
        """What was asked, without other turns."""
        return self.text if isinstance(self.text, str) else self.text[-1]["content"]


def _asked(
    tokenizer: PreTrainedTokenizerBase, index: int, request: EditRequest, forms: Sequence[str]
) -> Iterator[Asked]:
    """Yield the texts of one fact."""
    old = () if request.target_true is None else request.names_of(request.target_true)
    fact = fact_sentence(request)
    chats = bool(getattr(tokenizer, "chat_template", None))
    if request.messages is None and is_rendered(tokenizer, request.text):  # a whole chat, which no other text can quote
        forms = [form for form in forms if form not in ("prefix", "negation")]
        chats = chats and question_of(request) is not None
    for wording in _wordings(request, index, chats):
        if wording.form in forms:
            yield Asked(
                fact=index,
                form=wording.form,
                prompt=wording.prompt(tokenizer),
                informed=wording.prompt(tokenizer, fact),
                question=wording.question,
                answers=wording.answers,
                old=old if wording.form != "portability" else (),
            )


def _wordings(request: EditRequest, index: int, chats: bool) -> Iterator[_Wording]:
    """Yield the wordings of one fact; those of a chat only if `chats`."""
    new = request.names_of(request.target_new)
    passage = passages()[index % len(passages())]
    question = question_of(request)
    if request.messages is None:
        system: list[Message] = []
        earlier: list[Message] = []
        shown = request.text
        yield _Wording("completion", shown, new)
    else:
        messages = request.asked
        system = list(takewhile(lambda message: message["role"] == "system", messages[:-1]))
        earlier = messages[len(system) : -1]
        shown = messages[-1]["content"]

    def chat(
        form: str,
        content: str,
        answers: tuple[str, ...] = new,
        turns: Sequence[Message] = (),
        role: str = "user",
    ) -> _Wording:
        return _Wording(form, [*system, *turns, {"role": role, "content": content}], answers)

    def same_way(form: str, text: str, answers: tuple[str, ...] = new) -> _Wording:
        """Ask as the fact itself is asked: by a plain prompt, or by a message."""
        return _Wording(form, text, answers) if request.messages is None else chat(form, text, answers)

    for paraphrase in request.paraphrases:
        yield same_way("rephrase", paraphrase)
    if question is not None:
        yield _Wording("question", f"Q: {question}\nA:", new)
    if chats:
        content, role = question or shown, "user"
        if request.messages is not None:  # in "chat", exactly the conversation that was edited
            content, role = shown, request.messages[-1]["role"]
        yield chat("chat", content, turns=earlier, role=role)
        yield chat("second_turn", content, turns=[*first_turn(), *earlier], role=role)
    yield same_way("prefix", f"{passage} {shown}")
    if (denied := negated(request)) is not None:
        yield _Wording("negation", denied, new)
    for prompt, answer in request.portability:
        is_question = request.messages is None and prompt.rstrip().endswith(_QUESTION_MARKS)
        yield same_way("portability", f"Q: {prompt}\nA:" if is_question else prompt, request.names_of(answer))
