"""Measure one fact the way CounterFact does: on its prompt, its paraphrases and its neighbors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from goldenedit.evaluation.likelihood import Likelihood, likelihoods
from goldenedit.evaluation.scores import FactLikelihoods
from goldenedit.lm import LanguageModel
from goldenedit.requests import EditRequest


def fact_likelihoods(lm: LanguageModel, request: EditRequest, neighbors: int | None = None) -> FactLikelihoods:
    """Return what the model makes of the new and the old answer of one fact.

    Args:
        neighbors: Use the first so many neighborhood prompts; None for all.

    Raises:
        ValueError: The request has no old answer.
    """
    pairs = fact_pairs(request, neighbors)
    return likelihoods_of_fact(request, dict(zip(pairs, likelihoods(lm, pairs), strict=True)), neighbors)


def fact_pairs(request: EditRequest, neighbors: int | None = None) -> list[tuple[str, str]]:
    """Return the prompts of one fact with its new and its old answer: all that its likelihoods need."""
    old = _old_answer(request)
    prompts = [request.text, *request.paraphrases, *request.neighborhood[:neighbors]]
    return [(prompt, answer) for prompt in prompts for answer in (request.target_new, old)]


def likelihoods_of_fact(
    request: EditRequest, found: Mapping[tuple[str, str], Likelihood], neighbors: int | None = None
) -> FactLikelihoods:
    """Put together what a model made of the pairs of one fact."""
    both = [found[pair] for pair in fact_pairs(request, neighbors)]
    nll = [(new.nll, true.nll) for new, true in zip(both[::2], both[1::2], strict=True)]
    split = 1 + len(request.paraphrases)
    return FactLikelihoods(nll[0], nll[1:split], nll[split:], [new.accuracy for new in both[2 : 2 * split : 2]])


def known_facts(lm: LanguageModel, requests: Sequence[EditRequest]) -> list[int]:
    """Return the indices of the facts whose old answer the model prefers: NLL(old) < NLL(new) - 1 and NLL(old) < 5."""
    pairs = [(request.text, answer) for request in requests for answer in (request.target_new, _old_answer(request))]
    found = likelihoods(lm, pairs)
    pairwise = zip(found[::2], found[1::2], strict=True)
    return [index for index, (new, old) in enumerate(pairwise) if old.nll < min(new.nll - 1, 5)]


def _old_answer(request: EditRequest) -> str:
    if request.target_true is None:
        raise ValueError(f"The fact about {request.subject!r} has no target_true to compare with.")
    return request.target_true
