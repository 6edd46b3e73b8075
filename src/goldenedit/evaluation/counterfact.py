"""Likelihoods of a fact as CounterFact measures them: on its prompt, its paraphrases and its neighbors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from goldenedit.evaluation.likelihood import Likelihood, likelihoods
from goldenedit.evaluation.scores import FactLikelihoods
from goldenedit.lm import LanguageModel
from goldenedit.requests import EditRequest


def fact_likelihoods(lm: LanguageModel, request: EditRequest, neighbors: int | None = None) -> FactLikelihoods:
    """Return the likelihoods of the new and the old answer of one fact.

    Args:
        neighbors: Number of neighborhood prompts, from the first on; None for all.

    Raises:
        ValueError: The request has no `target_true`.
    """
    pairs = fact_pairs(request, neighbors)
    return likelihoods_of_fact(request, dict(zip(pairs, likelihoods(lm, pairs), strict=True)), neighbors)


def fact_pairs(request: EditRequest, neighbors: int | None = None) -> list[tuple[str, str]]:
    """Return the prompts of one fact, each with its new and its old answer."""
    old = _old_answer(request)
    prompts = [request.text, *request.paraphrases, *request.neighborhood[:neighbors]]
    return [(prompt, answer) for prompt in prompts for answer in (request.target_new, old)]


def likelihoods_of_fact(
    request: EditRequest, measured: Mapping[tuple[str, str], Likelihood], neighbors: int | None = None
) -> FactLikelihoods:
    """Return the likelihoods of one fact from those of all pairs of prompt and answer."""
    by_pair = [measured[pair] for pair in fact_pairs(request, neighbors)]
    new, old = by_pair[::2], by_pair[1::2]
    nll = [(of_new.nll, of_old.nll) for of_new, of_old in zip(new, old, strict=True)]
    split = 1 + len(request.paraphrases)
    return FactLikelihoods(
        rewrite=nll[0],
        paraphrases=nll[1:split],
        neighborhood=nll[split:],
        paraphrase_accuracy=[likelihood.accuracy for likelihood in new[1:split]],
    )


def known_facts(lm: LanguageModel, requests: Sequence[EditRequest]) -> list[int]:
    """Return the indices of the facts whose old answer the model prefers: NLL(old) < NLL(new) - 1 and NLL(old) < 5."""
    pairs = [(request.text, answer) for request in requests for answer in (request.target_new, _old_answer(request))]
    by_pair = likelihoods(lm, pairs)
    by_fact = zip(by_pair[::2], by_pair[1::2], strict=True)
    return [index for index, (new, old) in enumerate(by_fact) if old.nll < min(new.nll - 1, 5)]


def _old_answer(request: EditRequest) -> str:
    if request.target_true is None:
        raise ValueError(f"The fact about {request.subject!r} has no target_true to compare with. Set it.")
    return request.target_true
