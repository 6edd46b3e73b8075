"""The rows that the value of a subject is optimized on: its facts in several wordings, and what must stay the same."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from goldenedit.config import EditConfig
from goldenedit.editing.budget import facts_at_once
from goldenedit.editing.values import AnswerRow, KeptRow, SubjectRows
from goldenedit.editing.wordings import Wording, spelled
from goldenedit.evaluation.harm import asking
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.lm.decoding import Continuation
from goldenedit.lm.tokens import Row, encode, encode_request
from goldenedit.requests import ChatText, EditRequest
from goldenedit.subject_questions import ANY, kind_of, other_questions
from goldenedit.subjects import subject_places

logger = logging.getLogger(__name__)

_KEPT_TOKENS = 10  # of an answer that must stay the same


def subject_key(request: EditRequest) -> str:
    """Return what requests about one subject share, however they spell it."""
    return name_key(request.subject)


def name_key(name: str) -> str:
    """Return what the spellings of one name share."""
    return " ".join(name.casefold().split()).removeprefix("the ")


def subjects_of(requests: Sequence[EditRequest]) -> list[list[int]]:
    """Return the indices of the requests about each subject."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(subject_key(request), []).append(index)
    return list(groups.values())


def can_be_asked(lm: LanguageModel, request: EditRequest) -> bool:
    """Return whether a fact can be tokenized. One of a loaded folder may not, and must not refuse new edits."""
    try:
        encode(lm.tokenizer, rendered(lm.tokenizer, request).text, request.target_new, max_length=lm.max_length)
    except ValueError as error:
        logger.warning("Whether another edit changes an edited fact is unknown: %s", error)
        return False
    return True


def kept_rows(
    lm: LanguageModel,
    subjects: Sequence[Sequence[EditRequest]],
    config: EditConfig,
    locality: bool = True,
    kinds: Sequence[str] | None = None,
) -> list[list[KeptRow]]:
    """Return what must stay the same about each subject: what it is, and the model's answers to other questions.

    Args:
        lm: The unedited model.
        subjects: By subject, the facts that are edited, as the user wrote them.
        locality: Whether prompts in `locality` that name the subject are kept too. A benchmark that judges edits by
            these prompts must not.
        kinds: The kind of each subject; None to ask the model.
    """
    names = [facts[0].subject for facts in subjects]
    if kinds is None:
        kinds = kind_of(lm, names) if config.kept_questions else [ANY] * len(names)
    prompts = [
        _other_prompts(lm.tokenizer, facts, kind, config, locality) for facts, kind in zip(subjects, kinds, strict=True)
    ]
    answers = iter(lm.answers([prompt for of_subject in prompts for prompt in of_subject], _KEPT_TOKENS, None))
    rows: list[list[KeptRow]] = []
    for index, facts in enumerate(subjects):
        subject = facts[0].subject
        essence = encode(lm.tokenizer, f"{subject} is a", None, len(subject), lm.max_length)
        of_subject = [KeptRow(essence, config.kl_factor)]
        for prompt in prompts[index]:
            row = kept_row(lm, prompt, subject, next(answers))
            of_subject.append(KeptRow(row, config.kept_factor / len(prompts[index])))
        rows.append(of_subject)
    return rows


def _other_prompts(
    tokenizer: PreTrainedTokenizerBase, facts: Sequence[EditRequest], kind: str, config: EditConfig, locality: bool
) -> list[str]:
    """Return prompts about other properties of a subject: half of them questions, half of them beginnings."""
    subject = facts[0].subject
    prompts = []
    for index, entry in enumerate(other_questions(kind, facts, config.kept_questions, config.seed)):
        question, beginning = entry.about(subject)
        prompts.append(beginning if index % 2 else asking(tokenizer, question))
    for fact in facts if locality else ():
        prompts += [prompt for prompt, _ in rendered(tokenizer, fact).locality]
    return [prompt for prompt in prompts if subject_places(str(prompt), spelled(prompt, subject))]


def kept_row(lm: LanguageModel, prompt: str, subject: str, answer: Continuation) -> Row:
    """Return a prompt with the model's own answer, read from the prompt's end on."""
    text = prompt + answer.text
    text = ChatText(text) if isinstance(prompt, ChatText) else text
    name = spelled(prompt, subject)
    end = subject_places(str(prompt), name)[0] + len(name)
    whole = encode(lm.tokenizer, text, None, end, lm.max_length)
    begun = encode(lm.tokenizer, prompt, None, end, lm.max_length)
    return replace(whole, kept=tuple(range(begun.last, max(whole.last, begun.last + 1))))


def subject_rows(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    contexts: Sequence[str],
    worded: Sequence[Sequence[Wording]] = (),
    kept: Sequence[KeptRow] = (),
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
        taught = [encode_request(lm.tokenizer, own, own.target_new, prefix, lm.max_length) for prefix in contexts]
        for prompt in own.prompts if request.messages is None else ():
            other = replace(own, prompt=prompt, subject=spelled(prompt, own.subject), prompts=())
            taught.append(encode_request(lm.tokenizer, other, other.target_new, "", lm.max_length))
        rows = [AnswerRow(row, range(len(row.target))) for row in taught]
        rows += [worded_row(lm, wording) for wording in (worded[index] if worded else ())]
        answers.append(rows)
    (first, *_) = requests
    named = f"{first.subject!r} -> " + ", ".join(repr(request.target_new) for request in requests)
    return SubjectRows(answers, kept, named)


def worded_row(lm: LanguageModel, wording: Wording) -> AnswerRow:
    """Return a prompt in other words with the answer that is taught."""
    request, answer, new = wording.request, wording.answer, wording.request.target_new.strip()
    row = encode_request(lm.tokenizer, request, answer, "", lm.max_length, ends=True)
    start = answer.rfind(new)
    until = encode_request(lm.tokenizer, request, answer[: start + len(new)], "", lm.max_length)
    before = answer[:start].rstrip()
    first = len(encode_request(lm.tokenizer, request, before, "", lm.max_length).target) if before else 0
    return AnswerRow(row, range(min(first, len(until.target) - 1), len(until.target)))


def batch_size_of(lm: LanguageModel, config: EditConfig, subjects: Sequence[SubjectRows], layers: Sequence[int]) -> int:
    """Return how many subjects are optimized in one batch: as the config says, or as many as fit in memory."""
    if isinstance(config.batch_size, int):
        return config.batch_size
    rows = [row for subject in subjects for row in subject.rows]
    at_once = facts_at_once(
        lm.model,
        layers=lm.architecture.num_layers - layers[0],
        mlp_width=lm.architecture.shape(lm.model, layers[0])[1],
        rows=max(len(subject.rows) for subject in subjects),
        tokens=max(len(row.input_ids) for row in rows),
        answer_tokens=max(len(row.reads) for row in rows),
    )
    return min(lm.processes.gather(at_once))  # processes share the batches, so all must make the same
