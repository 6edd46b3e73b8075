"""What a call of `EditModel.edit` asks for, and what the user is told about it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from goldenedit.config import EditConfig
from goldenedit.requests import EditRequest, Facts, Message, as_requests, distinct
from goldenedit.storage.folder import EditedFact

logger = logging.getLogger(__name__)

_MOST_WARNINGS = 5  # of one kind, for one batch


def requests_of_call(
    prompt: str | Facts | None,
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
    if prompt is None or isinstance(prompt, str):
        if subject is None or target_new is None:
            kind = "messages" if prompt is None else "a prompt"
            raise ValueError(f"edit() with {kind} needs subject= and target_new=.")
        return [EditRequest(prompt, subject, target_new, target_true, messages=messages)]
    if subject is not None or target_new is not None or target_true is not None:
        raise ValueError("edit() with requests takes no subject, target_new or target_true: they are in the requests.")
    requests = distinct(as_requests(prompt))
    if not requests:
        raise ValueError("edit() needs at least one request.")
    return requests


def warn_of_doubtful_subjects(requests: Sequence[EditRequest]) -> None:
    """Log a warning for each request whose subject may stand in another place; only the first few of a large batch."""
    doubts = [doubt for request in requests if (doubt := request.doubt) is not None]
    for doubt in doubts[:_MOST_WARNINGS]:
        logger.warning("%s", doubt)
    if count := len(doubts[_MOST_WARNINGS:]):
        logger.warning("The subjects of %d more requests may stand in another place (EditRequest.doubt).", count)


def warn_of_failed_facts(facts: Sequence[EditedFact], config: EditConfig) -> None:
    """Log a warning for each fact that does not take; only the first few of a large batch."""
    failed = [fact for fact in facts if not fact.takes]
    for fact in failed[:_MOST_WARNINGS]:
        logger.warning(
            "The edit of %r does not take: the probability of %r after %r went from %.4f to %.4f. Try another layer "
            "(this was %s; EditConfig.layer), more steps (EditConfig.steps), or another editor (EditConfig.method).",
            fact.request.subject,
            fact.request.target_new,
            fact.request.shown,
            fact.probability_before,
            fact.probability_after,
            config.target_layers,
        )
    if count := len(failed[_MOST_WARNINGS:]):
        logger.warning("%d more facts of this batch do not take: see `takes` of the edit's facts.", count)
