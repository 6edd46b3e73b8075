"""What a call of `EditModel.edit` asks for, and what the user is told about it."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from goldenedit.config import EditConfig
from goldenedit.editing.prepared import Changes
from goldenedit.editing.rows import can_be_asked, subject_key
from goldenedit.evaluation.likelihood import Likelihood, likelihoods
from goldenedit.lm import LanguageModel
from goldenedit.lm.chat import rendered
from goldenedit.requests import EditRequest, Facts, Message, as_requests, distinct
from goldenedit.storage.folder import Edit, EditedFact

logger = logging.getLogger(__name__)

_MOST_WARNINGS = 5  # of one kind, for one batch
RECHECKED = 32  # facts of other edits that are asked again after an edit


def requests_of_call(
    prompt: str | Sequence[str] | Facts | None,
    subject: str | None,
    target_new: str | None,
    target_true: str | None,
    messages: Sequence[Message] | None,
) -> list[EditRequest]:
    """Return the requests that the arguments of `edit` stand for.

    Raises:
        ValueError: The arguments do not go together, or two requests contradict each other.
    """
    if (prompt is None) == (messages is None):
        raise ValueError("edit() takes either a prompt, requests or messages.")
    texts = [prompt] if isinstance(prompt, str) else _texts(prompt)
    if prompt is None or texts:
        if subject is None or target_new is None:
            kind = "messages" if prompt is None else "a prompt"
            raise ValueError(f"edit() with {kind} needs subject= and target_new=.")
        return [EditRequest(None, subject, target_new, target_true, messages=messages, prompts=texts)]
    if subject is not None or target_new is not None or target_true is not None:
        raise ValueError("edit() with requests takes no subject, target_new or target_true: they are in the requests.")
    requests = distinct(as_requests(prompt))  # type: ignore[arg-type]
    if not requests:
        raise ValueError("edit() needs at least one request.")
    return requests


def _texts(prompts: object) -> list[str]:
    """Return prompts that teach one fact together; empty if these are requests."""
    if not isinstance(prompts, list | tuple):
        return []
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    return texts if len(texts) == len(prompts) else []


def warn_of_doubtful_subjects(requests: Sequence[EditRequest]) -> None:
    """Log a warning for each request whose subject may stand in another place; only the first few of a large batch."""
    doubts = [doubt for request in requests if (doubt := request.doubt) is not None]
    for doubt in doubts[:_MOST_WARNINGS]:
        logger.warning("%s", doubt)
    if count := len(doubts[_MOST_WARNINGS:]):
        logger.warning("The subjects of %d more requests may stand in another place (EditRequest.doubt).", count)


def facts_to_keep(
    edits: Iterable[Edit], requests: Sequence[EditRequest], with_failed: bool = False
) -> list[EditRequest]:
    """Return the facts of earlier edits, without those that new requests replace.

    Args:
        with_failed: Whether those that did not take are among them.
    """
    replaced = {request.prompt_key for request in requests}
    return [
        fact.request
        for prompt, fact in latest_facts(edits).items()
        if (fact.takes or with_failed) and prompt not in replaced
    ]


def latest_facts(edits: Iterable[Edit]) -> dict[tuple[str, bool], EditedFact]:
    """Return the facts of edits by their prompts; of one prompt, the fact that was edited last."""
    return {fact.request.prompt_key: fact for edit in edits for fact in edit.facts}


def facts_to_recheck(
    edits: Sequence[Edit], requests: Sequence[EditRequest], most: int | None = RECHECKED
) -> list[EditedFact]:
    """Return the facts of earlier edits that a new edit may lose: those that took, in the order they were made.

    Facts whose prompt gets a new answer are left out, because they are replaced on purpose.

    Args:
        edits: The active edits before the new one.
        requests: The facts of the new edit.
        most: Largest number of facts; None for all. Of more, that many are drawn, always the same.
    """
    replaced = {request.prompt_key for request in requests}
    facts = [fact for prompt, fact in latest_facts(edits).items() if fact.takes and prompt not in replaced]
    if most is None or len(facts) <= most:
        return facts
    logger.info("Of %d facts of the other active edits, %d are asked again.", len(facts), most)
    return [facts[index] for index in sorted(random.Random(0).sample(range(len(facts)), most))]


def check_facts(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    changes: Changes,
    others: Sequence[EditedFact],
    without_edit: Callable[[], AbstractContextManager[None]],
) -> tuple[list[EditedFact], tuple[EditedFact, ...]]:
    """Ask the facts of a new edit, and together with them facts of other edits.

    Returns the facts of the new edit, and the other facts that it loses: those that take without it and not with it.

    Args:
        lm: The model, with all active edits in effect.
        requests: The facts of the new edit, as they were passed in.
        changes: The result of the editor.
        others: The facts of the other active edits that are asked again.
        without_edit: Returns a context that switches the new edit off.

    Raises:
        ValueError: The answers are not finite.
    """
    others = [fact for fact in others if can_be_asked(lm, fact.request)]
    answers = likelihoods(lm, _pairs(lm, [*requests, *(fact.request for fact in others)]))
    for request, answer in zip(requests, answers, strict=False):
        if not math.isfinite(answer.nll):
            raise ValueError(
                f"The edit of {request.subject!r} makes the model's answers not finite, so it was taken back. Lower "
                "the editor's learning rate, or load the model in float32 or bfloat16."
            )
    facts = [
        EditedFact(request, before, answer.probability, steps, answer.weakest)
        for request, before, answer, steps in zip(
            requests, changes.probability_before, answers[: len(requests)], changes.steps, strict=True
        )
    ]
    now = [_answered(fact, answer) for fact, answer in zip(others, answers[len(requests) :], strict=True)]
    doubtful = [fact for fact in now if not fact.takes]
    if not doubtful:
        return facts, ()
    # Another edit may have lost them, or they took beside edits that are off. So ask what the new edit alone changes.
    with without_edit():
        return facts, tuple(_that_take(lm, doubtful))


def facts_lost_together(
    lm: LanguageModel,
    groups: Sequence[Sequence[Edit]],
    only: Callable[[Sequence[str]], AbstractContextManager[None]],
) -> list[EditedFact]:
    """Return facts of edits that were made apart which take in their own group, and not beside the other groups.

    Facts of large groups are drawn, and those whose prompt gets another answer in another group are left out.

    Args:
        lm: The model that carries the edits.
        groups: Groups of edits that were made together.
        only: Returns a context in which exactly these edits are on.
    """
    facts = []
    for group in groups:
        others = [fact.request for other in groups if other is not group for edit in other for fact in edit.facts]
        facts.append([fact for fact in facts_to_recheck(group, others) if can_be_asked(lm, fact.request)])
    every = [fact for of_group in facts for fact in of_group]
    if not every:
        return []
    with only([edit.name for group in groups for edit in group]):
        answers = iter(likelihoods(lm, _pairs(lm, [fact.request for fact in every])))
    lost = []
    for group, of_group in zip(groups, facts, strict=True):
        now = [_answered(fact, answer) for fact, answer in zip(of_group, answers, strict=False)]
        if doubtful := [fact for fact in now if not fact.takes]:
            with only([edit.name for edit in group]):
                lost += _that_take(lm, doubtful)
    return lost


def _answered(fact: EditedFact, answer: Likelihood) -> EditedFact:
    return replace(fact, probability_after=answer.probability, weakest_after=answer.weakest)


def _that_take(lm: LanguageModel, facts: Sequence[EditedFact]) -> list[EditedFact]:
    """Return the facts that take in the model as it is, with the probability there as the one before."""
    answers = likelihoods(lm, _pairs(lm, [fact.request for fact in facts])) if facts else []
    return [
        replace(fact, probability_before=answer.probability)
        for fact, answer in zip(facts, answers, strict=True)
        if _answered(fact, answer).takes
    ]


def _pairs(lm: LanguageModel, requests: Sequence[EditRequest]) -> list[tuple[str, str]]:
    prompts = [rendered(lm.tokenizer, request).text for request in requests]
    return [(prompt, request.target_new) for prompt, request in zip(prompts, requests, strict=True)]


def without_marker(edits: Sequence[Edit], down_projections: Mapping[int, str]) -> list[str]:
    """Return the names of edits with a subject that has no marker in any of the edits.

    An edit about a subject that has a marker already makes no other one, see `goldenedit.editing.gated`.

    Args:
        edits: The edits that are to work together.
        down_projections: Their paths by layer.
    """
    names = []
    for edit in edits:
        config = edit.config
        if config is None or not config.has_editor or not config.editor.gates:
            continue  # an editor that is not installed has no markers that are known here
        if set(edit.layers) <= set(config.target_layers):
            continue  # values under keys
        first = edit.deltas.get(down_projections[config.target_layers[0]])
        markers = 0 if first is None else int(first.B.any(0).sum())  # in files, all factors have one rank
        keys = _subject_keys([edit])
        if markers >= len(keys):
            continue
        others = _subject_keys(other for other in edits if other is not edit)
        # A part of a name may share the marker of the whole name.
        covered = sum(any(key in other or other in key for other in others) for key in keys)
        if markers + covered < len(keys):
            names.append(edit.name)
    return names


def _subject_keys(edits: Iterable[Edit]) -> set[str]:
    return {subject_key(fact.request) for edit in edits for fact in edit.facts}


def warn_of_lost_facts(lost: Sequence[EditedFact]) -> None:
    """Log one warning that names the facts of other edits that the new edit loses; only the first few of many."""
    if lost:
        logger.warning(
            "The new edit loses %s. Edit them together with the new facts in one batch, or try another layer "
            "(EditConfig.layer) or another editor (EditConfig.method).",
            _named(lost, " of other active edits", " (see `lost` of the edit)"),
        )


def warn_of_facts_lost_together(lost: Sequence[EditedFact], folder: Path) -> None:
    """Log one warning that names the facts of edits that were made apart and do not go together."""
    if lost:
        logger.warning(
            "The edits of %s and those of this model were made apart. All switched on, they lose %s. Switch on only "
            "those that you need (set_adapter), or make these facts again in this model.",
            folder,
            _named(lost),
        )


def _named(lost: Sequence[EditedFact], of: str = "", more: str = "") -> str:
    """Return the number of facts and what became of the first few."""
    named = ", ".join(
        f"{fact.request.shown!r} -> {fact.request.target_new!r} (probability {fact.probability_before:.3f} -> "
        f"{fact.probability_after:.3f})"
        for fact in lost[:_MOST_WARNINGS]
    )
    count = len(lost[_MOST_WARNINGS:])
    return f"{len(lost)} fact{'s' * (len(lost) != 1)}{of}: {named}" + (f", and {count} more{more}" if count else "")


def warn_of_failed_facts(facts: Sequence[EditedFact], config: EditConfig) -> None:
    """Log a warning for each fact that does not take, with the reason; only the first few of a large batch."""
    failed = [fact for fact in facts if not fact.takes]
    for fact in failed[:_MOST_WARNINGS]:
        logger.warning(
            "The edit of %r does not take (%s): the probability of %r after %r went from %.4f to %.4f%s. "
            "Try another layer (this was %s; EditConfig.layer), more steps (EditConfig.steps), or another editor "
            "(EditConfig.method).",
            fact.request.subject,
            fact.failure,
            fact.request.target_new,
            fact.request.shown,
            fact.probability_before,
            fact.probability_after,
            fact.weakest_note,
            config.target_layers,
        )
    if count := len(failed[_MOST_WARNINGS:]):
        logger.warning("%d more facts of this batch do not take: see `failure` of the edit's facts.", count)
