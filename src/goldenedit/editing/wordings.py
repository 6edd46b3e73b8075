"""The wordings in which a fact is taught: as people ask for it, and as the model itself answers.

An edit that only knows "The capital of X is" does not hold when a user of a chat asks "What is the capital of X?". So
the fact is also taught as a question, plain and in the chat template, in the first and in a later turn. A model answers
a question in its own words: "The capital of X is Paris." Teaching it to say "Rome" instead, as the first word, would
change much that has nothing to do with the fact. So its own answer is taught, with the new answer in place of the old
one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from goldenedit.evaluation.verdicts import answer_end
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.lm.decoding import Continuation
from goldenedit.lm.tokens import is_rendered, prompt_tokens, with_answer
from goldenedit.questions import question_from
from goldenedit.rephrasing import Rephrasings, rephrased, without
from goldenedit.requests import ChatText, EditRequest, Message
from goldenedit.subjects import find_subject, respelled_subject

_OTHER_QUESTIONS = 2
_OTHER_STATEMENTS = 1
LENGTH = 24  # tokens of the model's own answer
_EARLIER: tuple[Message, ...] = (
    {"role": "user", "content": "Can you help me with a few questions?"},
    {"role": "assistant", "content": "Of course. What would you like to know?"},
)


@dataclass(frozen=True)
class Wording:
    """A fact in one wording.

    Attributes:
        request: The fact with this prompt, as the model reads it.
        answer: What the model should answer: a text with the new answer in it.
    """

    request: EditRequest
    answer: str


def asked(tokenizer: PreTrainedTokenizerBase, request: EditRequest) -> list[EditRequest]:
    """Return the questions that ask for a fact, as the model reads them, in wordings that follow from its own text.

    Texts of the request that measure an edit, such as `paraphrases` and `question`, are not used.

    Args:
        request: The fact as the user wrote it, not rendered.
    """
    if request.messages is not None:
        system = next((index for index, message in enumerate(request.messages) if message["role"] != "system"), 0)
        later = [*request.messages[:system], *_EARLIER, *request.messages[system:]]
        asked_in = [[*request.messages[:system], {"role": "user", "content": prompt}] for prompt in request.prompts]
        return [_in_chat(tokenizer, request, messages) for messages in (later, *asked_in)]
    if _is_as_read(tokenizer, request):
        return []
    found = []
    for index, prompt in enumerate((request.text, *request.prompts)):
        found += _as_question(tokenizer, asking_as(request, prompt), is_first=index == 0)
    return found


def asked_otherwise(tokenizer: PreTrainedTokenizerBase, request: EditRequest) -> list[EditRequest]:
    """Return questions that ask for a fact in other words than its own, as the model reads them.

    The first of them is asked plainly and in a chat, the others in one way: in a chat if there is a chat template.
    """
    others = None if _is_as_read(tokenizer, request) else rephrasings_of(request)
    found = []
    for index, question in enumerate(others.questions[:_OTHER_QUESTIONS] if others else ()):
        ways = _as_question(tokenizer, asking_as(request, question), is_first=False)
        found += ways if index == 0 else ways[-1:]
    return found


def _is_as_read(tokenizer: PreTrainedTokenizerBase, request: EditRequest) -> bool:
    """Return whether the prompt is a whole conversation already, which no other one can quote."""
    return request.messages is None and (isinstance(request.prompt, ChatText) or is_rendered(tokenizer, request.text))


def stated(request: EditRequest) -> list[EditRequest]:
    """Return a fact as statements in other words, which its answer ends."""
    others = rephrasings_of(request)
    return [asking_as(request, text) for text in (others.statements[:_OTHER_STATEMENTS] if others else ())]


def rephrasings_of(request: EditRequest) -> Rephrasings | None:
    """Return other texts about the property that a fact asks for, without those that measure the edit."""
    if request.messages is not None or isinstance(request.prompt, ChatText):
        return None
    found = rephrased(request.text, request.subject_start, request.subject_end, request.target_new)
    measuring = [request.question, *request.paraphrases, *request.generation, *(text for text, _ in request.locality)]
    return None if found is None else without(found, [text for text in measuring if text])


def asking_as(request: EditRequest, prompt: str) -> EditRequest:
    """Return a request with another prompt for the same fact."""
    return replace(request, prompt=prompt, subject=spelled(prompt, request.subject), prompts=())


def _as_question(tokenizer: PreTrainedTokenizerBase, request: EditRequest, is_first: bool) -> list[EditRequest]:
    """Return a prompt as a question, plain and in a chat; for the first prompt, also in a later turn."""
    text = request.text
    question = text if text.rstrip().endswith("?") else None
    question = question or question_from(text, request.subject_start, request.subject_end)
    plain = f"Q: {question or text}\nA:"
    found = [replace(request, prompt=plain, subject=spelled(plain, request.subject))]
    if getattr(tokenizer, "chat_template", None):
        first: Message = {"role": "user", "content": question or text}
        conversations = [[first]]
        if is_first:
            conversations.append([*_EARLIER, first])
        found += [_in_chat(tokenizer, request, messages) for messages in conversations]
    return found


def _in_chat(tokenizer: PreTrainedTokenizerBase, request: EditRequest, messages: Sequence[Message]) -> EditRequest:
    subject = spelled(messages[-1]["content"], request.subject)
    return rendered(tokenizer, replace(request, prompt=None, messages=list(messages), subject=subject, prompts=()))


def fitting(lm: LanguageModel, request: EditRequest, others: Sequence[EditRequest]) -> list[EditRequest]:
    """Return those of some wordings of a fact that the model takes together with an answer."""
    if lm.max_length is None:
        return list(others)
    answer = request.target_new if request.messages is not None else with_answer(request.text, request.target_new)
    # Behind the answer come a period and the end of a turn.
    room = lm.max_length - max(LENGTH, len(prompt_tokens(lm.tokenizer, answer))) - 2
    return [other for other in others if len(prompt_tokens(lm.tokenizer, other.text)) <= room]


def worded(lm: LanguageModel, requests: Sequence[EditRequest]) -> list[list[Wording]]:
    """Return the wordings of facts. The model must be the unedited one: its own answers are used."""
    by_fact = [
        fitting(lm, request, [*asked(lm.tokenizer, request), *asked_otherwise(lm.tokenizer, request)])
        for request in requests
    ]
    prompts = [other.text for others in by_fact for other in others]
    own = iter(lm.answers(prompts, LENGTH, _has_ended))
    return [
        [
            *(Wording(other, _answer(request, other, next(own))) for other in others),
            *(Wording(other, request.target_new) for other in fitting(lm, request, stated(request))),
        ]
        for request, others in zip(requests, by_fact, strict=True)
    ]


def _has_ended(text: str) -> bool:
    return answer_end(text) is not None


def _answer(request: EditRequest, other: EditRequest, own: Continuation) -> str:
    """Return the model's own answer with the new answer in place of the old one, or else the fact as a statement."""
    end = answer_end(own.text, own.finished)
    sentence = own.text if end is None else own.text[:end]
    names_subject = find_subject(sentence, other.subject) or find_subject(sentence, request.subject)
    old = () if request.target_true is None else request.names_of(request.target_true)
    places = [(place.start, -len(name)) for name in old if (place := find_subject(sentence, name)) and place.whole]
    if end is not None and places and names_subject:
        start, length = min(places)
        rest = sentence[start - length :]
        if not any(map(str.isalnum, rest)):  # "the Boston, Chile" is no answer
            return f"{sentence[:start]}{request.target_new.strip()}{rest}"
    is_statement = request.messages is None and not request.text.rstrip().endswith("?")
    if is_statement and (isinstance(other.prompt, ChatText) or names_subject):
        return f"{with_answer(request.text, request.target_new)}."
    return request.target_new


def spelled(text: str, subject: str) -> str:
    """Return the subject as a text spells it: a question has its article in lower case."""
    return subject if subject in text else respelled_subject([text], subject) or subject
