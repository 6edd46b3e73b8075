"""The rows that the value of a subject is optimized on: its facts in several wordings, and what must stay the same."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from goldenedit.config import EditConfig
from goldenedit.editing.values import SubjectRows
from goldenedit.editing.wordings import Wording
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import conversation, rendered
from goldenedit.lm.decoding import Continuation
from goldenedit.lm.tokens import Row, encode, encode_request, with_answer
from goldenedit.requests import ChatText, EditRequest
from goldenedit.subjects import subject_places

_TMP = [
    ("Where is {} from?", "{} comes from"),
    ("Who founded {}?", "{} was founded by"),
    ("What does {} do?", "The main activity of {} is"),
    ("What language belongs to {}?", "The language of {} is"),
    ("Who leads {}?", "The leader of {} is"),
    ("Who is related to {}?", "{} is related to"),
    ("What is the age of {}?", "The age of {} is"),
    ("What belongs to {}?", "{} owns"),
]


def subjects_of(requests: Sequence[EditRequest]) -> list[list[int]]:
    """Return the indices of the requests about each subject."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(" ".join(request.subject.casefold().split()).removeprefix("the "), []).append(index)
    return list(groups.values())


def kept_rows(lm: LanguageModel, request: EditRequest, config: EditConfig) -> list[tuple[Row, float]]:
    """Return what must stay the same about a subject: that it is what it is, and the answers to other questions."""
    subject = request.subject
    essence = encode(lm.tokenizer, f"{subject} is a", None, len(subject), lm.max_length)
    rows = [(essence, config.kl_factor)]
    count = int(os.environ.get("KEEP", "4"))
    factor = float(os.environ.get("KEEPF", "3"))
    length = int(os.environ.get("KEEPL", "10"))
    if not count or not factor:
        return rows
    prompts: list[str] = []
    for question, prompt in _TMP[:count]:
        question, prompt = question.format(subject), prompt.format(subject)
        if getattr(lm.tokenizer, "chat_template", None):
            prompts.append(conversation(lm.tokenizer, [{"role": "user", "content": question}]))
        else:
            prompts.append(f"Q: {question}\nA:")
        prompts.append(prompt)
    answers = lm.answers(prompts, length, None)
    for prompt, answer in zip(prompts, answers, strict=True):
        rows.append((kept_row(lm, prompt, subject, answer), factor / len(prompts)))
    return rows


def kept_row(lm: LanguageModel, prompt: str, subject: str, answer: Continuation) -> Row:
    """Return a prompt with the model's own answer, read from the prompt's end on, with all mentions of the subject."""
    text = prompt + answer.text
    text = ChatText(text) if isinstance(prompt, ChatText) else text
    ends = [start + len(subject) for start in subject_places(str(text), subject)]
    whole = encode(lm.tokenizer, text, None, ends[0], lm.max_length)
    begun = encode(lm.tokenizer, prompt, None, ends[0], lm.max_length)
    later = [encode(lm.tokenizer, text, None, end, lm.max_length).subject for end in ends[1:]]
    kept = tuple(range(begun.last, max(whole.last, begun.last + 1)))
    return replace(whole, kept=kept, later=tuple(place for place in later if place <= kept[-1]))


def subject_rows(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    worded: Sequence[Sequence[Wording]] = (),
    kept: Sequence[tuple[Row, float]] = (),
) -> SubjectRows:
    """Return the rows of one subject.

    Args:
        requests: Its facts, as the user wrote them.
        contexts: Prefixes of each prompt, the first of them empty.
        worded: Other wordings of each fact.
        kept: What must stay the same about it.

    Raises:
        ValueError: A request cannot be tokenized.
    """
    answers = []
    for index, request in enumerate(requests):
        own = rendered(lm.tokenizer, request)
        rows = [(encode_request(lm.tokenizer, own, own.target_new, prefix, lm.max_length), 1.0) for prefix in contexts]
        rows += [_worded_row(lm, wording) for wording in (worded[index] if worded else ())]
        answers.append(rows)
    (first, *_) = requests
    named = f"{first.subject!r} -> " + ", ".join(repr(request.target_new) for request in requests)
    return SubjectRows(answers, kept, named)


def _worded_row(lm: LanguageModel, wording: Wording) -> tuple[Row, float]:
    """Return the row of a wording, and its weight: the tokens around the new answer do not dilute it."""
    request, answer = wording.request, wording.answer
    row = encode_request(lm.tokenizer, request, answer, "", lm.max_length, ends=True)
    alone = encode_request(lm.tokenizer, request, request.target_new, "", lm.max_length)
    text = str(with_answer(request.text, answer))
    text = ChatText(text) if isinstance(request.prompt, ChatText) else text
    places = [start + len(request.subject) for start in subject_places(str(text), request.subject)]
    ends = [end for end in places if end > request.subject_end]
    later = [encode(lm.tokenizer, text, None, end).subject for end in ends]
    later = [place for place in later if row.subject < place <= row.reads[-1]]
    return replace(row, later=tuple(later)), len(row.target) / len(alone.target)
