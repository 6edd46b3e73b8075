"""Measure a model on facts in every family of scores, all prompts in one go, batched by length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from goldenedit.evaluation.counterfact import fact_pairs, likelihoods_of_fact
from goldenedit.evaluation.likelihood import Likelihood, likelihoods, likelihoods_with_and_without
from goldenedit.evaluation.scores import (
    FactGenerations,
    FactMatches,
    Measured,
    generation_scores,
    probability_scores,
    says,
    token_match_scores,
    with_intervals,
)
from goldenedit.lm import LanguageModel
from goldenedit.lm.sampling import sample_continuations
from goldenedit.lm.tokens import encode
from goldenedit.requests import EditRequest

Pair = tuple[str, str]


@dataclass(frozen=True)
class Evaluation:
    """What edited and base model make of the same facts, by family: `probability`, `token_match`, `generation`."""

    edited: dict[str, Measured]
    base: dict[str, Measured]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as JSON has them."""
        states = {"edited": self.edited, "base": self.base}
        return {
            state: {family: measured.to_dict() for family, measured in families.items()}
            for state, families in states.items()
        }


@dataclass(frozen=True)
class Observed:
    """What a model made of facts in one state: likelihoods of answers, and what it writes freely."""

    found: Mapping[Pair, Likelihood]
    written: Mapping[str, str]


def observe(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    generation: bool = False,
    neighbors: int | None = None,
) -> Observed:
    """Run the model once over all that the scores of some facts need.

    Args:
        generation: Let the model write freely as well.
        neighbors: Use the first so many neighborhood prompts of each fact; None for all.
    """
    pairs = _pairs(requests, neighbors)
    found = likelihoods(lm, pairs)
    written = _written(lm, requests) if generation else {}
    return Observed(dict(zip(pairs, found, strict=True)), written)


def observe_with_and_without(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    start: int,
    without_edits: Callable[[], AbstractContextManager[None]],
    generation: bool = False,
    neighbors: int | None = None,
) -> tuple[Observed, Observed]:
    """Observe the model with its edits and without them; the layers before the edits run once for both.

    Args:
        start: First layer with an edit.
        without_edits: Returns a context that switches the edits off.
        generation: Let both write freely as well.
        neighbors: Use the first so many neighborhood prompts of each fact; None for all.
    """
    pairs = _pairs(requests, neighbors)
    both = likelihoods_with_and_without(lm, pairs, start, without_edits)
    written: list[dict[str, str]] = [{}, {}]
    if generation:
        written[0] = _written(lm, requests)
        with without_edits():
            written[1] = _written(lm, requests)
    now, before = (
        Observed(dict(zip(pairs, found, strict=True)), texts) for found, texts in zip(both, written, strict=True)
    )
    return now, before


def _pairs(requests: Sequence[EditRequest], neighbors: int | None) -> list[Pair]:
    """Return every prompt with every answer that the scores of some facts need."""
    pairs: dict[Pair, None] = {}
    for request in requests:
        pairs |= dict.fromkeys([*_matched(request), *request.locality])
        if request.target_true is not None:
            pairs |= dict.fromkeys(fact_pairs(request, neighbors))
    return list(pairs)


def _written(lm: LanguageModel, requests: Sequence[EditRequest]) -> dict[str, str]:
    """Return what the model writes freely after each prompt whose answer an edit should give."""
    asked = list(dict.fromkeys(pair for request in requests for pair in _matched(request)))
    length = max(len(encode(lm.tokenizer, *pair).target) for pair in asked)
    prompts = list(dict.fromkeys(prompt for prompt, _ in asked))
    texts = sample_continuations(lm, prompts, length + 1, seed=0, top_k=1)
    return {prompt: text.removeprefix(prompt) for prompt, text in zip(prompts, texts, strict=True)}


def measure(
    requests: Sequence[EditRequest], now: Observed, before: Observed, neighbors: int | None = None
) -> dict[str, Measured]:
    """Return the scores of every family that the facts have prompts for.

    Args:
        now: What the model to be scored made of them.
        before: What the base model made of them, for locality.
    """
    compared = [request for request in requests if request.target_true is not None]
    families: dict[str, Measured] = {}
    if compared:
        # Without the accuracy on paraphrases, which is a token match.
        facts = [replace(likelihoods_of_fact(fact, now.found, neighbors), paraphrase_accuracy=()) for fact in compared]
        families["probability"] = with_intervals(probability_scores, facts)
    families["token_match"] = with_intervals(
        token_match_scores, [matches_of(request, now.found, before.found) for request in requests]
    )
    if now.written:
        families["generation"] = with_intervals(
            generation_scores, [_generations(request, now.written) for request in requests]
        )
    return families


def _matched(request: EditRequest) -> list[Pair]:
    """Return the prompts whose answers an edited model should give."""
    own = [(prompt, request.target_new) for prompt in (request.text, *request.paraphrases)]
    return [*own, *request.portability]


def matches_of(request: EditRequest, now: Mapping[Pair, Likelihood], before: Mapping[Pair, Likelihood]) -> FactMatches:
    """Put together the token matches of one fact, from what the model makes of it now and made of it before."""
    shares = [now[pair].accuracy for pair in _matched(request)]
    split = 1 + len(request.paraphrases)
    kept = [_share(now[pair].choices, before[pair].choices) for pair in request.locality]
    return FactMatches(shares[0], shares[1:split], shares[split:], kept)


def _share(now: Sequence[int], before: Sequence[int]) -> float:
    return sum(one == other for one, other in zip(now, before, strict=True)) / len(before)


def _generations(request: EditRequest, written: Mapping[str, str]) -> FactGenerations:
    said = [says(written[prompt], answer) for prompt, answer in _matched(request)]
    split = 1 + len(request.paraphrases)
    return FactGenerations(said[0], said[1:split], said[split:])
