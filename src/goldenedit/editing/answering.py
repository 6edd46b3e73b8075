"""What neurons that give answers respond to, and what not: the texts about a subject, and the rows that follow."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, cycle, islice, zip_longest

import torch
from torch import Tensor, nn

from goldenedit.config import EditConfig
from goldenedit.editing.gates import Gates, Spare, inputs_of
from goldenedit.editing.rows import kept_rows, subject_key, subjects_of, worded_row
from goldenedit.editing.values import AnswerRow, KeptRow, SubjectRows
from goldenedit.editing.wordings import Wording, asked, asking_as, fitting, rephrasings_of, spelled
from goldenedit.editors.gated import answer_rows
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.lm.tokens import Row, encode, encode_request, prompt_tokens, with_answer
from goldenedit.rephrasing import properties
from goldenedit.requests import ChatText, EditRequest
from goldenedit.subject_questions import is_about, kind_of, names_like, open_requests, other_questions
from goldenedit.subjects import subject_places

_OTHER_PROPERTIES = 60
_OTHER_QUESTIONS = 30
_NAMES = 10  # of other subjects
_NEIGHBORS = 12  # prompts about them, for each kind of wording
_BESIDE = 12  # the same of subjects that are edited as well
_LEAKS = 12  # prompts that ask for other edited facts
_MARKED = 15  # wordings that a marker is optimized on
_TAUGHT = 24  # wordings that the value of a fact is optimized on
_STRENGTHS = (1.0, 2 / 3, 4 / 3)  # at which a value is to give the answer, in turn
_FOLLOWED = 6  # wordings of a fact behind whose answer the model goes on
_FOLLOWING = 8  # tokens
_ANSWERED = 16  # tokens of answers to what asks for no property
_FOLLOWING_WEIGHT = 3.0
_BEHIND_TEXT = 2  # contexts of a statement in other words, of each length
_LONGER_CONTEXTS, _LONGER = 5, 32  # their number, and their tokens
_BEGUN = 3  # statements that an answer may begin with
_BEGUN_QUESTIONS = 2  # questions whose answers begin with them
_EARLIER = 8  # wordings of an earlier fact
_BEFORE_ANSWER = 6  # last tokens of what must stay the same


@dataclass(frozen=True)
class FactTexts:
    """The texts about one fact.

    Attributes:
        wordings: By kind of wording, prompts with the new answer. Their `target` begins with the new answer.
        neighbors: Tokens of the same prompts about other subjects, by kind of wording.
        following: What the model writes behind the new answer.
        request: The fact, as the user wrote it.
    """

    wordings: Sequence[Sequence[AnswerRow]]
    neighbors: Sequence[Sequence[Sequence[int]]]
    following: Sequence[KeptRow]
    request: EditRequest


@dataclass(frozen=True)
class AskedSubject:
    """The texts about one subject.

    Attributes:
        facts: Those of its facts.
        kept: What the model must go on saying about it.
        others: Prompts that ask for something else about it, to some of them with the model's answers. What comes from
            their `subject` on is where another answer is due.
        name: What error messages call the subject and its new answers.
        leaks: Prompts that ask for facts of other subjects in earlier edits, with this subject in the place of theirs.
        beside: Those other subjects, as the user spelled them.
    """

    facts: Sequence[FactTexts]
    kept: Sequence[KeptRow]
    others: Sequence[Row]
    name: str
    leaks: Sequence[Row] = ()
    beside: Sequence[str] = ()

    @property
    def mentions(self) -> SubjectRows:
        """Some wordings of each fact with what is kept, as many as a marker needs, of other kinds for each fact."""
        most = max(_MARKED // len(self.facts), 4)
        some = [_few(fact.wordings, most, turn) for turn, fact in enumerate(self.facts)]
        return SubjectRows(some, self.kept, self.name)

    @property
    def due(self) -> list[Row]:
        """The same wordings as texts that end where the answer is due."""
        rows = [answer.row for answers in self.mentions.answers for answer in answers]
        ends = [row.reads[0] for row in rows]
        return [
            replace(row, input_ids=row.input_ids[: end + 1], target=(), last=end, kept=())
            for row, end in zip(rows, ends, strict=True)
        ]

    @property
    def taught(self) -> list[SubjectRows]:
        """What the value of each fact is optimized on: from where the answer is due on, and at several strengths.

        In wordings that are not taught the neuron responds less or more.
        """
        return [
            SubjectRows(
                [
                    [
                        replace(answer, row=replace(answer.row, subject=answer.row.reads[0]), strength=strength)
                        for answer, strength in zip(_few(fact.wordings, _TAUGHT), cycle(_STRENGTHS))
                    ]
                ],
                fact.following,
                self.name,
            )
            for fact in self.facts
        ]


@dataclass(frozen=True)
class AskedTexts:
    """The texts about subjects, with the requests about each.

    Attributes:
        groups: By subject, the indices of its requests.
        subjects: By subject, its texts.
    """

    groups: Sequence[Sequence[int]]
    subjects: Sequence[AskedSubject]


def texts_about(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    config: EditConfig,
    contexts: Sequence[str],
    earlier: Sequence[EditRequest] = (),
    joint: bool = True,
) -> AskedTexts:
    """Return the texts about the subjects of requests. The model must be the unedited one.

    Args:
        requests: The facts, as the user wrote them.
        contexts: Prefixes of each prompt, the first of them empty.
        earlier: Facts of earlier edits, which stay.
        joint: Whether facts about one subject belong together. Otherwise each is about a subject of its own, and
            prompts of `locality` are not kept.

    Raises:
        ValueError: A request cannot be tokenized.
    """
    groups = subjects_of(requests) if joint else [[index] for index in range(len(requests))]
    subjects = [[requests[index] for index in group] for group in groups]
    keys = [subject_key(facts[0]) for facts in subjects]
    known = [[fact for fact in earlier if subject_key(fact) == key] for key in keys]
    beside = [[fact for fact in earlier if subject_key(fact) != key] for key in keys]
    together = [[*facts, *before] for facts, before in zip(subjects, known, strict=True)]
    kinds = kind_of(lm, [facts[0].subject for facts in subjects])
    kept = kept_rows(lm, together, config, joint, kinds)
    behind = contexts, _longer_contexts(lm, config) if len(contexts) > 1 else []
    return AskedTexts(
        groups,
        [
            _texts(lm, facts, before, others, kind, of_subject, behind, config)
            for facts, before, others, kind, of_subject in zip(subjects, known, beside, kinds, kept, strict=True)
        ],
    )


def answer_gates(
    lm: LanguageModel,
    texts: Sequence[AskedSubject],
    spare: Spare,
    marked: Callable[[], AbstractContextManager[None]],
    beside: Sequence[Sequence[str]] | None = None,
) -> Gates:
    """Return neurons that respond where the answers of facts are due, the facts of one subject after another.

    Args:
        lm: The model without the markers of these subjects, and with those of the active edits.
        texts: The texts of each subject.
        spare: The neurons that may be rewritten.
        marked: Returns a context with the markers in place.
        beside: By subject, the other subjects that its facts are told from. Defaults to all the others, and those of
            earlier edits.
    """
    names = [subject.facts[0].request.subject for subject in texts]
    if beside is None:
        beside = [[*names[:index], *names[index + 1 :], *of.beside] for index, of in enumerate(texts)]
    by_subject = lm.processes.map(
        lambda pair: _rows_of_answers(lm, pair[0], spare, marked, pair[1]), list(zip(texts, beside, strict=True))
    )
    return Gates.of(spare, chain(*by_subject))


def _rows_of_answers(
    lm: LanguageModel,
    subject: AskedSubject,
    spare: Spare,
    marked: Callable[[], AbstractContextManager[None]],
    beside: Sequence[str],
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the rows of each fact's neuron.

    Args:
        beside: Other subjects that have markers.
    """
    inputs = _Inputs(lm, lm.model.get_submodule(spare.neurons.gate.path))
    neighbors = [[inputs(of_kind) for of_kind in fact.neighbors] for fact in subject.facts]
    with marked():
        of_others = [
            [inputs(_beside(lm, fact.request, answers, beside)) for answers in fact.wordings] for fact in subject.facts
        ]
        parts = [[inputs.parts(of_kind) for of_kind in fact.wordings] for fact in subject.facts]
        kept = inputs([row.row.input_ids for row in subject.kept])
        asked_else = list(zip(subject.others, inputs([row.input_ids for row in subject.others]), strict=True))
        following = [
            [
                x[row.row.subject :]
                for row, x in zip(fact.following, inputs([r.row.input_ids for r in fact.following]), strict=True)
            ]
            for fact in subject.facts
        ]
    due = [[x for x, _ in of_fact] for of_fact in parts]
    outside = [x for of_fact in parts for _, x in of_fact] + [*kept, *(x[: row.subject] for row, x in asked_else)]
    not_due = [x[-_BEFORE_ANSWER:] for x in kept] + [x[row.subject :] for row, x in asked_else]
    rows = []
    for index, of_fact in enumerate(neighbors):
        others = [x for place, of_other in enumerate(due) if place != index for x in of_other]
        not_asked = torch.cat([*not_due, *following[index], *others])
        not_marked = [torch.stack([x[-1] for x in of_kind]) for of_kind in of_fact if of_kind]
        around = torch.cat([*outside, *(x[:-1] for of_kind in of_fact for x in of_kind)])
        others_marked = [torch.stack([x[-1] for x in of_kind]) for of_kind in of_others[index] if of_kind]
        w, u, e = answer_rows(due[index], not_asked, not_marked, around, spare.moments, others_marked)
        rows.append((w, 2 * u - w, e))
    return rows


class _Inputs:
    """The inputs of a linear map on texts, `(tokens, d)` float32 each."""

    def __init__(self, lm: LanguageModel, site: nn.Module) -> None:
        self.lm, self.site = lm, site

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        if not rows:
            return []
        (found,) = inputs_of(self.lm, [list(row) for row in rows], [self.site])
        return list(found.split([len(row) for row in rows]))

    def parts(self, answers: Sequence[AnswerRow]) -> tuple[Tensor, Tensor]:
        """Return the inputs where the tokens of the new answer are due, and those at all other tokens."""
        due, around = [], []
        for answer, x in zip(answers, self([answer.row.input_ids for answer in answers]), strict=True):
            is_due = torch.zeros(len(x), dtype=torch.bool)
            is_due[[answer.row.reads[place] for place in answer.core]] = True
            due.append(x[is_due])
            around.append(x[~is_due])
        return torch.cat(due), torch.cat(around)


def _few(by_kind: Sequence[Sequence[AnswerRow]], count: int, turn: int = 0) -> list[AnswerRow]:
    """Return some wordings, always the same: the first of all, and of each kind as many as of the others.

    Args:
        turn: 0 for the first of them, 1 for those that come next, and so on.
    """
    generator = random.Random(0)
    mixed = [[of_kind[0], *generator.sample(of_kind[1:], len(of_kind) - 1)] for of_kind in by_kind]
    first, *rest = [answer for turns in zip_longest(*mixed) for answer in turns if answer is not None]
    count = min(count - 1, len(rest))
    return [first, *islice(cycle(rest), turn * count, (turn + 1) * count)]


# ---------------------------------------------------------------------- texts


def _texts(
    lm: LanguageModel,
    facts: Sequence[EditRequest],
    earlier: Sequence[EditRequest],
    beside: Sequence[EditRequest],
    kind: str,
    kept: Sequence[KeptRow],
    contexts: tuple[Sequence[str], Sequence[str]],
    config: EditConfig,
) -> AskedSubject:
    (first, *_) = facts
    named = f"{first.subject!r} -> " + ", ".join(repr(fact.target_new) for fact in facts)
    known = [answer for fact in earlier for answer in _few(_wordings(lm, fact, contexts, config), _EARLIER)]
    told = [KeptRow(replace(answer.row, target=(), kept=tuple(answer.row.reads)), 1 / len(known)) for answer in known]
    asked_else, answered = _other_prompts(lm, [*facts, *earlier], kind, config.seed)
    asked_else += [_prompt(answer) for answer in known]
    others = [_behind(tokens, []) for tokens in asked_else] + _continued(lm, answered, _ANSWERED)
    return AskedSubject(
        facts=[_of_fact(lm, fact, kind, contexts, config) for fact in facts],
        kept=[*kept, *told],
        others=others,
        name=named,
        leaks=_leaks(lm, beside, first.subject, config.seed),
        beside=list(dict.fromkeys(fact.subject for fact in beside)),
    )


def _leaks(lm: LanguageModel, others: Sequence[EditRequest], subject: str, seed: int) -> list[Row]:
    """Return prompts that ask for facts about other subjects, with a subject in the place of theirs."""
    generator = random.Random(seed)
    prompts: list[tuple[str, str]] = []
    for fact in generator.sample(others, min(len(others), _LEAKS)):
        with suppress(ValueError):  # a fact of an edit that was loaded, which this tokenizer cannot ask for
            texts = [other.text for other in (*_own(lm, fact), *asked(lm.tokenizer, fact))]
            prompts += [(_decoded(lm, prompt_tokens(lm.tokenizer, text)), fact.subject) for text in texts]
    leaks: list[Row] = []
    for text, other in generator.sample(prompts, min(len(prompts), _LEAKS)):
        renamed = ChatText(_renamed(text, other, subject))
        if places := subject_places(renamed, subject):
            with suppress(ValueError):  # with this name it is too long
                leaks.append(encode(lm.tokenizer, renamed, None, places[0] + len(subject), lm.max_length))
    return leaks


def _of_fact(
    lm: LanguageModel,
    request: EditRequest,
    kind: str,
    contexts: tuple[Sequence[str], Sequence[str]],
    config: EditConfig,
) -> FactTexts:
    by_kind = _wordings(lm, request, contexts, config)
    names = names_like(kind, request.subject, _NAMES, config.seed)
    neighbors = [_neighbors(lm, request, answers, names, _NEIGHBORS, config.seed) for answers in by_kind]
    return FactTexts(by_kind, neighbors, _following(lm, _few(by_kind, _FOLLOWED)), request)


def _wordings(
    lm: LanguageModel, request: EditRequest, contexts: tuple[Sequence[str], Sequence[str]], config: EditConfig
) -> list[list[AnswerRow]]:
    """Return prompts that ask for a fact, with the new answer, by kind of wording.

    Args:
        contexts: Prefixes of a prompt, and longer ones, which are left out where they do not fit.
    """
    by_kind = [[row for prompt in _own(lm, request) for row in _behind_contexts(lm, prompt, *contexts)]]
    if config.phrasings == "auto":
        by_kind += _other_wordings(lm, request, contexts)
    return [answers for answers in by_kind if answers]


def _neighbors(
    lm: LanguageModel,
    request: EditRequest,
    answers: Sequence[AnswerRow],
    names: Sequence[str],
    count: int,
    seed: int | str,
) -> list[list[int]]:
    """Return the tokens of up to `count` prompts, or a few more, with other subjects in the place of a fact's."""
    if not names:
        return []
    generator = random.Random(seed)
    each = min(-(-count // len(answers)), len(names))
    prompts = list(dict.fromkeys(_decoded(lm, _prompt(answer)) for answer in answers))
    neighbors = []
    for prompt in generator.sample(prompts, min(len(prompts), count)):
        if _renamed(prompt, request.subject, "") == prompt:  # it does not name the subject
            continue
        for name in generator.sample(names, each):
            neighbors.append(prompt_tokens(lm.tokenizer, ChatText(_renamed(prompt, request.subject, name))))
    return [tokens for tokens in neighbors if lm.max_length is None or len(tokens) <= lm.max_length]


def _beside(
    lm: LanguageModel, request: EditRequest, answers: Sequence[AnswerRow], names: Sequence[str]
) -> list[list[int]]:
    """Return the same prompts with subjects that are edited as well, of many of them others for each fact."""
    return _neighbors(lm, request, answers, names, _BESIDE, f"{request.subject} {request.target_new}")


def _renamed(text: str, subject: str, name: str) -> str:
    """Return a text with another name in the place of a subject, with its article in upper and in lower case."""
    subject = spelled(text, subject)
    article, rest = ("[Tt]he ", subject[4:]) if subject[:4] in ("The ", "the ") else ("", subject)
    return re.sub(article + re.escape(rest), lambda _: name, text)


def _own(lm: LanguageModel, request: EditRequest) -> list[EditRequest]:
    """Return the prompts that the user wrote, as the model reads them."""
    own = rendered(lm.tokenizer, request)
    if request.messages is not None:
        return [own]
    further = [replace(own, prompt=prompt, subject=spelled(prompt, own.subject), prompts=()) for prompt in own.prompts]
    return [own, *further]


def _other_wordings(
    lm: LanguageModel, request: EditRequest, contexts: tuple[Sequence[str], Sequence[str]]
) -> list[list[AnswerRow]]:
    """Return prompts that ask for a fact otherwise, with the new answer, by kind of wording.

    They are statements in other words, questions, questions in a chat, and questions with the beginning of an answer.
    """
    new = request.target_new.strip()
    if request.messages is not None or isinstance(request.prompt, ChatText):
        others = fitting(lm, request, asked(lm.tokenizer, request))
        return [[_asked_row(lm, Wording(other, new)) for other in others]]
    found = rephrasings_of(request)
    statements = [asking_as(request, text) for text in (found.statements if found else ())]
    questions = [request, *(asking_as(request, text) for text in (found.questions if found else ()))]
    begun_with = [text for text in (request, *statements) if not text.text.rstrip().endswith("?")][:_BEGUN]
    begun = [Wording(request, f"{with_answer(text.text, request.target_new)}.") for text in begun_with]
    kinds: list[list[AnswerRow]] = [[], [], [], []]
    some = contexts[0][: _BEHIND_TEXT + 1], contexts[1][:_BEHIND_TEXT]
    kinds[0] = [row for text in statements for row in _behind_contexts(lm, text, *some)]
    for index, question in enumerate(questions):
        for other in fitting(lm, request, asked(lm.tokenizer, replace(question, prompts=()))):
            kinds[2 if isinstance(other.prompt, ChatText) else 1].append(_asked_row(lm, Wording(other, new)))
            if index < _BEGUN_QUESTIONS:
                kinds[3] += [_asked_row(lm, Wording(other, sentence.answer)) for sentence in begun]
    return kinds


def _longer_contexts(lm: LanguageModel, config: EditConfig) -> list[str]:
    """Return prefixes that are as long as a paragraph; none if the model does not take texts that long."""
    with suppress(ValueError):
        return lm.contexts(replace(config, contexts=_LONGER_CONTEXTS + 1, context_length=_LONGER))[1:]
    return []


def _behind_contexts(
    lm: LanguageModel, request: EditRequest, contexts: Sequence[str], longer: Sequence[str]
) -> list[AnswerRow]:
    """Return a prompt behind each context, and behind those of the longer ones that leave room for it."""
    rows = [_row(lm, request, context) for context in contexts]
    for context in longer:
        with suppress(ValueError):
            rows.append(_row(lm, request, context, shortens=False))
    return rows


def _row(lm: LanguageModel, request: EditRequest, context: str, shortens: bool = True) -> AnswerRow:
    """Return a prompt with the new answer, and in a chat with the end of the turn behind it."""
    whole = encode_request(lm.tokenizer, request, request.target_new, context, lm.max_length, True, shortens)
    until = encode_request(lm.tokenizer, request, request.target_new, context, lm.max_length, False, shortens)
    return AnswerRow(whole, range(min(len(until.target), len(whole.target))))


def _asked_row(lm: LanguageModel, wording: Wording) -> AnswerRow:
    """Return a question with its answer, of which only what begins with the new answer is taught."""
    answer = worded_row(lm, wording)
    row, start = answer.row, answer.core.start
    return AnswerRow(replace(row, target=row.target[start:]), range(len(answer.core)))


def _prompt(answer: AnswerRow) -> list[int]:
    """Return the tokens in front of an answer."""
    return list(answer.row.input_ids[: answer.row.reads[0] + 1])


def _decoded(lm: LanguageModel, tokens: Sequence[int]) -> str:
    return str(lm.tokenizer.decode(list(tokens)))


def _following(lm: LanguageModel, answers: Sequence[AnswerRow]) -> list[KeptRow]:
    """Return what the model writes behind new answers."""
    begun = [list(answer.row.input_ids[: answer.row.target[answer.core[-1]] + 1]) for answer in answers]
    rows = [row for row in _continued(lm, begun, _FOLLOWING) if row.kept]
    return [KeptRow(row, _FOLLOWING_WEIGHT / len(answers)) for row in rows]


def _continued(lm: LanguageModel, prompts: Sequence[Sequence[int]], count: int) -> list[Row]:
    """Return the tokens of prompts with up to `count` tokens that the model writes behind them."""
    written = lm.answers([ChatText(_decoded(lm, tokens)) for tokens in prompts], count, None)
    return [_behind(tokens, more.tokens) for tokens, more in zip(prompts, written, strict=True)]


def _behind(tokens: Sequence[int], more: Sequence[int]) -> Row:
    """Return tokens as a row whose logits are read from their last one on, up to the last but one of those behind."""
    ids, last = [*tokens, *more], len(tokens) - 1
    return Row(tuple(ids), last, (), len(ids) - 1, tuple(range(last, len(ids) - 1)))


def _other_prompts(
    lm: LanguageModel, facts: Sequence[EditRequest], kind: str, seed: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of prompts that ask for other properties of a subject, and of those that ask for none.

    The first are statements, questions, and chats.
    """
    subject = facts[0].subject
    # "Where is {}?" may be a wording of a fact that shares no word with its own text.
    found = [(fact, rephrasings_of(fact)) for fact in facts]
    facts = [
        *facts,
        *(asking_as(fact, text) for fact, other in found if other for text in (*other.questions, *other.statements)),
    ]
    relations = {other.relation for _, other in found if other}
    listed = [
        entry
        for entry in properties()
        if entry.relation not in relations
        and not is_about([entry.relation, *entry.questions, *entry.statements], facts)
    ]
    chosen = random.Random(seed).sample(listed, min(_OTHER_PROPERTIES, len(listed)))
    texts = [(entry.questions[0], entry.statements[0]) for entry in chosen]
    texts += [(entry.question, entry.prompt) for entry in other_questions(kind, facts, _OTHER_QUESTIONS, seed)]
    plain = EditRequest(f"{subject} is", subject, facts[0].target_new)
    prompts: list[str] = []
    for index, (question, statement) in enumerate(texts):
        if index % 3 == 0:
            prompts.append(statement.replace("{}", subject))
        else:
            ways = asked(lm.tokenizer, asking_as(plain, question.replace("{}", subject)))
            prompts.append(ways[0 if index % 3 == 1 else len(ways[:2]) - 1].text)
    about = [asked(lm.tokenizer, asking_as(plain, text))[:2][-1].text for text in open_requests(subject)]
    tokens = partial(prompt_tokens, lm.tokenizer)
    return list(map(tokens, prompts)), list(map(tokens, about))
