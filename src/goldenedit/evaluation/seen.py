"""What a user sees: ask a model for facts in every form, and compare everything else with the base model.

`baseline` runs the base model once. `ask` and `harm.compare` run an edited one. `seen` turns both into figures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from goldenedit.evaluation.forms import FORMS, Asked, asked_forms
from goldenedit.evaluation.harm import KINDS, Compared, Other, continuation_row, other_prompts, text_rows
from goldenedit.evaluation.judges import Judge
from goldenedit.evaluation.report import (
    FormScores,
    Share,
    Text,
    TextScores,
    UnchangedScores,
    share_of,
    text_scores,
)
from goldenedit.evaluation.texts import plain_texts
from goldenedit.evaluation.verdicts import answer_end, answer_of, contains, is_exact, key_word, mentions
from goldenedit.lm import LanguageModel
from goldenedit.lm.decoding import Continuation, Ends, greedy
from goldenedit.lm.tokens import Row, prompt_tokens
from goldenedit.requests import EditRequest

logger = logging.getLogger(__name__)

Writer = Callable[[Sequence[str], int, Ends | None], list[Continuation]]


@dataclass(frozen=True)
class SeenOptions:
    """What is measured of what a user sees.

    Attributes:
        forms: Forms in which facts are asked, see `goldenedit.evaluation.forms.FORMS`; none to ask nothing.
        unchanged: Whether to compare other prompts and plain text with the base model.
        in_prompt: Whether to ask the base model with the fact in its prompt as well.
        neighbors: Number of neighborhood prompts of each fact, from the first on; None for all.
        max_new_tokens: Largest number of tokens of an answer.
        continuation: Number of tokens of other prompts' continuations.
        texts: Number of plain texts, of about 65 tokens each.
        judge: Decides whether a text says an answer, beside the two verdicts.
    """

    forms: tuple[str, ...] = tuple(FORMS)
    unchanged: bool = True
    in_prompt: bool = True
    neighbors: int | None = None
    max_new_tokens: int = 50
    continuation: int = 32
    texts: int = 32
    judge: Judge | None = None


@dataclass(frozen=True)
class Baseline:
    """What the base model writes, and what an edited model is compared with.

    Attributes:
        requests: The facts.
        options: What is measured.
        asked: The texts that ask for the facts.
        answers: The base model's answer to each of them.
        informed: Its answer with the fact in its prompt, None where that is too long; empty if it was not asked.
        others: Prompts whose answers should not change.
        continuations: What the base model writes after them.
        rows: The others with their continuations, then the plain texts, as token rows.
    """

    requests: Sequence[EditRequest]
    options: SeenOptions
    asked: Sequence[Asked]
    answers: Sequence[str]
    informed: Sequence[str | None]
    others: Sequence[Other] = ()
    continuations: Sequence[Continuation] = ()
    rows: Sequence[Row] = ()

    def about(self, fact: int) -> Baseline:
        """Return the part about one fact: its own texts, and those that belong to no fact."""
        asked = [place for place, text in enumerate(self.asked) if text.fact == fact]
        others = [place for place, other in enumerate(self.others) if other.fact in (fact, -1)]
        return Baseline(
            self.requests,
            self.options,
            [self.asked[place] for place in asked],
            [self.answers[place] for place in asked],
            [self.informed[place] for place in asked] if self.informed else (),
            [self.others[place] for place in others],
            [self.continuations[place] for place in others],
            [self.rows[place] for place in others] + list(self.rows[len(self.others) :]),
        )


@dataclass(frozen=True)
class Seen:
    """Figures of one model.

    Attributes:
        says: How often it says the answers, by form.
        in_prompt: How often the base model does with the fact in its prompt, by form.
        unchanged: How often it writes what the base model writes, by kind of prompt.
        text: How far it is from the base model on plain text; None if not measured.
    """

    says: dict[str, FormScores] = field(default_factory=dict)
    in_prompt: dict[str, FormScores] = field(default_factory=dict)
    unchanged: dict[str, UnchangedScores] = field(default_factory=dict)
    text: TextScores | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures that were measured as JSON values."""
        groups = {name: getattr(self, name) for name in ("says", "unchanged", "in_prompt")}
        figures = {
            name: {key: scores.to_dict() for key, scores in group.items()} for name, group in groups.items() if group
        }
        return figures if self.text is None else {**figures, "text": self.text.to_dict()}


def baseline(
    lm: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[EditRequest],
    options: SeenOptions,
    write: Writer | None = None,
) -> Baseline:
    """Ask the base model everything that an edited one will be asked. All edits must be off.

    Args:
        lm: The base model.
        tokenizer: Its tokenizer.
        requests: The facts, as the user wrote them, not rendered.
        options: What to measure.
        write: Writes the continuations of prompts, with at most so many tokens, up to an end. By default each
            continuation of the base model is written once and kept.
    """
    write = write or lm.answers
    asked = _fitting(lm, asked_forms(tokenizer, requests, options.forms))
    told = [text.informed if fits(lm, text.informed) else None for text in asked] if options.in_prompt else []
    if left_out := told.count(None):
        logger.warning(
            "%d of %d texts are not asked with the fact in the prompt: %s.", left_out, len(asked), _too_long(lm)
        )
    prompts = [text.prompt for text in asked] + [prompt for prompt in told if prompt is not None]
    texts = iter([answer_of(continuation.text) for continuation in write(prompts, options.max_new_tokens, has_ended)])
    answers = [next(texts) for _ in asked]
    informed = [None if prompt is None else next(texts) for prompt in told]
    if not options.unchanged:
        return Baseline(requests, options, asked, answers, informed)
    prompts_of_others = other_prompts(tokenizer, requests, options.neighbors)
    others = [other for other in prompts_of_others if fits(lm, other.prompt)]
    if left_out := len(prompts_of_others) - len(others):
        logger.warning(
            "%d of %d prompts whose answers should not change are left out: %s.",
            left_out,
            len(prompts_of_others),
            _too_long(lm),
        )
    continuations = write([other.prompt for other in others], options.continuation, None)
    rows = [
        continuation_row(lm, other.prompt, continuation.tokens, continuation.finished)
        for other, continuation in zip(others, continuations, strict=True)
    ]
    rows += text_rows(lm, plain_texts()[: options.texts])
    return Baseline(requests, options, asked, answers, informed, others, continuations, rows)


def _fitting(lm: LanguageModel, asked: Sequence[Asked]) -> list[Asked]:
    """Return the texts that leave the model room for an answer. Edited prompts are kept, so that asking them raises."""
    fitting = [text for text in asked if text.form == "completion" or fits(lm, text.prompt)]
    if left_out := len(asked) - len(fitting):
        logger.warning("%d of %d texts that ask for facts are left out: %s.", left_out, len(asked), _too_long(lm))
    return fitting


def fits(lm: LanguageModel, prompt: str) -> bool:
    """Return whether a prompt leaves the model room for an answer."""
    return lm.max_length is None or len(prompt_tokens(lm.tokenizer, prompt)) < lm.max_length


def _too_long(lm: LanguageModel) -> str:
    return f"they leave no room for an answer in the model's context of {lm.max_length} tokens"


def has_ended(text: str) -> bool:
    """Return whether an answer needs no more tokens."""
    return answer_end(text) is not None


def ask(lm: LanguageModel, base: Baseline, compared: Sequence[Compared] = ()) -> tuple[list[str], dict[int, str]]:
    """Ask an edited model for the facts, about the rest of their subjects, and what else it was found to answer anew.

    Args:
        compared: The edited model on the baseline's rows; empty if not measured.

    Returns:
        Its answers to the texts that ask for facts, and its continuations of other prompts by their number.
    """
    places = [
        place
        for place, other in enumerate(base.others)
        if other.kind == "subject" or (compared and not all(compared[place].same))
    ]
    written = greedy(lm, [text.prompt for text in base.asked], base.options.max_new_tokens, has_ended)
    others = greedy(lm, [base.others[place].prompt for place in places], base.options.continuation)
    texts = [continuation.text.strip() for continuation in others]
    return [answer_of(answer.text) for answer in written], dict(zip(places, texts, strict=True))


@dataclass(frozen=True)
class Measurement:
    """An edited model beside its baseline.

    Attributes:
        base: The baseline, or a part of it.
        written: The edited model's answers to the texts that ask for facts.
        others: Its continuations of other prompts by their number: all about subjects, and those that changed.
        compared: The edited model on the baseline's rows; empty if not measured.
        control: A random change on these rows; empty if not measured.
    """

    base: Baseline
    written: Sequence[str]
    others: Mapping[int, str]
    compared: Sequence[Compared] = ()
    control: Sequence[Compared] = ()


def seen(measurements: Sequence[Measurement], edited: bool = True) -> Seen:
    """Return the figures of an edited model, or of the base model, over one or several measurements.

    Args:
        measurements: Measurements of disjoint facts with the same options: one of a model with all its edits, or one
            for each of several single edits.
        edited: Whether the figures are those of the edited model.
    """
    judge = measurements[0].base.options.judge
    own = [
        (text, answer)
        for measured in measurements
        for text, answer in zip(measured.base.asked, measured.written if edited else measured.base.answers, strict=True)
    ]
    informed = [
        (text, answer)
        for measured in measurements
        if measured.base.informed
        for text, answer in zip(measured.base.asked, measured.base.informed, strict=True)
        if answer is not None
    ]
    return Seen(
        says=_form_scores(own, judge, is_base=not edited),
        in_prompt=_form_scores(informed, judge),
        unchanged=_unchanged(measurements, edited),
        text=_text(measurements, edited),
    )


def _form_scores(
    answered: Sequence[tuple[Asked, str]], judge: Judge | None, is_base: bool = False
) -> dict[str, FormScores]:
    """Return the scores of each form that was asked.

    Args:
        is_base: Whether the answers are the base model's. It should answer a negated prompt with the old answer no more
            often than the edited model answers it with the new one.
    """
    by_form: dict[str, dict[int, list[tuple[bool, bool, bool]]]] = {form: {} for form in FORMS}
    for text, answer in tqdm(answered, desc="Judging", unit="text", leave=False, disable=judge is None):
        expected, unwanted = text.answers, text.old
        if is_base and text.form == "negation":
            expected, unwanted = text.old, ()
        if not expected:
            continue
        judged = judge is not None and bool(judge(text.question, expected[0], answer))
        verdicts = is_exact(answer, expected), contains(answer, expected, unwanted), judged
        by_form[text.form].setdefault(text.fact, []).append(verdicts)
    scores = {}
    for form, by_fact in by_form.items():
        if by_fact:
            exact, said, judged_so = (
                share_of([[verdicts[place] for verdicts in group] for group in by_fact.values()]) for place in range(3)
            )
            scores[form] = FormScores(exact, said, None if judge is None else judged_so)
    return scores


def _unchanged(measurements: Sequence[Measurement], edited: bool) -> dict[str, UnchangedScores]:
    """Return the scores of each kind of other prompts."""
    scores = {}
    for kind in KINDS:
        same: dict[tuple[int, int], list[bool]] = {}
        control: dict[tuple[int, int], list[bool]] = {}
        kl: list[float] = []
        keywords: dict[int, list[bool]] = {}
        says_new: dict[int, list[bool]] = {}
        for number, measured in enumerate(measurements):
            is_single = len(measurements) > 1
            for place, other in enumerate(measured.base.others if measured.compared or not edited else ()):
                if other.kind != kind:
                    continue
                # Prompts that belong to no fact count one by one, or for each edit that they were compared under.
                group = (number, -1) if is_single else (other.fact, place if other.fact < 0 else 0)
                result = measured.compared[place] if edited else None
                same.setdefault(group, []).append(result is None or all(result.same))
                kl.append(0.0 if result is None else result.kl[0])
                if measured.control and edited:
                    control.setdefault(group, []).append(all(measured.control[place].same))
                if kind == "subject" and edited:
                    request = measured.base.requests[other.fact]
                    answer = answer_of(measured.others[place])
                    names = request.names_of(request.target_new)
                    says_new.setdefault(other.fact, []).append(mentions(answer, names))
                    word = key_word(other.question, answer_of(measured.base.continuations[place].text))
                    if word is not None:
                        keywords.setdefault(other.fact, []).append(mentions(answer, [word]))
        if same:
            scores[kind] = UnchangedScores(
                same=share_of(list(same.values())),
                n=len(kl),
                kl=sum(kl) / len(kl),
                control=_share(control),
                keyword=_share(keywords),
                says_new=_share(says_new),
            )
    return scores


def _share(groups: Mapping[Any, Sequence[bool]]) -> Share | None:
    return share_of(list(groups.values())) if groups else None


def _text(measurements: Sequence[Measurement], edited: bool) -> TextScores | None:
    """Return the scores on plain text. Over several measurements, each of them is one text."""
    compared: list[Sequence[Compared]] = [
        measured.compared[len(measured.base.others) :] for measured in measurements if measured.compared
    ]
    if not compared:
        return None
    control: list[Sequence[Compared]] = [
        measured.control[len(measured.base.others) :] for measured in measurements if measured.control
    ]
    if len(measurements) > 1:
        compared, control = [[_joined(texts)] for texts in compared], [[_joined(texts)] for texts in control]
    texts = [text for several in compared for text in several if text.same]
    if not texts:
        return None
    if not edited:
        unchanged = [[True] * len(text.same) for text in texts]
        return text_scores([[0.0] * len(text.kl) for text in texts], unchanged, None)
    controls = [text.kl for several in control for text in several] or None
    return text_scores([text.kl for text in texts], [text.same for text in texts], controls)


def _joined(texts: Sequence[Compared]) -> Compared:
    return Compared(
        tuple(agrees for text in texts for agrees in text.same), tuple(value for text in texts for value in text.kl)
    )


def texts_of(measured: Measurement) -> list[Text]:
    """Return all prompts with what the models write after them, facts first."""
    base = measured.base
    texts = [
        Text(
            fact=asked.fact,
            kind=asked.form,
            question=asked.question,
            base=base.answers[place],
            edited=measured.written[place],
            informed=base.informed[place] if base.informed else None,
            answers=asked.answers,
            holds=contains(measured.written[place], asked.answers, asked.old) != (asked.form == "negation"),
        )
        for place, asked in enumerate(base.asked)
    ]
    for place, other in enumerate(base.others if measured.compared else ()):
        before = base.continuations[place].text.strip()
        is_same = all(measured.compared[place].same)
        after = measured.others.get(place, before)
        texts.append(Text(other.fact, other.kind, other.question, before, after, None, (), is_same))
    return texts
