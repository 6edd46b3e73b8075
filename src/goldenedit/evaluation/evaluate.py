"""Measure a model on facts in all families of scores, with one run over all prompts, in batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from goldenedit import html
from goldenedit.evaluation.counterfact import fact_pairs, likelihoods_of_fact
from goldenedit.evaluation.likelihood import Likelihood, likelihoods, likelihoods_with_and_without
from goldenedit.evaluation.report import FormScores, Share, Text, TextScores, UnchangedScores
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
from goldenedit.evaluation.seen import Seen
from goldenedit.lm import LanguageModel
from goldenedit.lm.sampling import sample_continuations
from goldenedit.lm.tokens import encode
from goldenedit.requests import EditRequest

Pair = tuple[str, str]


@dataclass(frozen=True, repr=False)
class Evaluation:
    """An edited model and its base model on the same facts.

    Attributes:
        edited: Scores of papers by family: `probability`, `token_match`, `generation`.
        base: The same of the base model.
        edited_seen: What a user sees of the edited model.
        base_seen: What a user sees of the base model.
        texts: All prompts, with what the models write after them.
    """

    edited: dict[str, Measured]
    base: dict[str, Measured]
    edited_seen: Seen = field(default_factory=Seen)
    base_seen: Seen = field(default_factory=Seen)
    texts: tuple[Text, ...] = ()

    def __repr__(self) -> str:
        said = [f"{form} {scores.contains.value:.2f}" for form, scores in self.says.items()]
        same = [f"{kind} {scores.same.value:.2f}" for kind, scores in self.unchanged.items()]
        parts = {"says": said, "unchanged": same, "KL on text": [] if self.text is None else [f"{self.text.kl:.2g}"]}
        shown = "; ".join(f"{name}: {', '.join(figures)}" for name, figures in parts.items() if figures)
        return f"Evaluation({shown or ', '.join(self.edited)})"

    def _repr_html_(self) -> str:
        """Return what a user sees as tables, for notebooks."""
        said = [
            (form.replace("_", " "), _figure(scores.contains), *self._others(form), scores.n)
            for form, scores in self.says.items()
        ]
        same = [(kind, _figure(scores.same), f"{scores.kl:.2g}", scores.n) for kind, scores in self.unchanged.items()]
        tables = [
            html.table(("says the new answer", "edited", "base", "fact in the prompt", "n"), said),
            html.table(("unchanged", "texts", "KL", "n"), same),
        ]
        if self.text is not None:
            row = (f"{self.text.kl:.2g}", f"{self.text.worst:.2g}", f"{self.text.agreement:.3f}", self.text.tokens)
            tables.append(html.table(("plain text: KL", "worst text", "same first choice", "tokens"), [row]))
        return "".join(tables)

    def _others(self, form: str) -> tuple[str, str]:
        """Return how often the base model says the answers, and with the facts in its prompt."""
        base, informed = self.base_seen.says.get(form), self.in_prompt.get(form)
        return tuple("" if scores is None else f"{scores.contains.value:.2f}" for scores in (base, informed))  # type: ignore[return-value]

    @property
    def says(self) -> dict[str, FormScores]:
        """How often the edited model says the answers, by form."""
        return self.edited_seen.says

    @property
    def in_prompt(self) -> dict[str, FormScores]:
        """How often the base model says them with the fact in its prompt, by form."""
        return self.edited_seen.in_prompt

    @property
    def unchanged(self) -> dict[str, UnchangedScores]:
        """How often the edited model writes what the base model writes, by kind of prompt."""
        return self.edited_seen.unchanged

    @property
    def text(self) -> TextScores | None:
        """How far the edited model is from the base model on plain text."""
        return self.edited_seen.text

    def to_dict(self) -> dict[str, Any]:
        """Return all scores as JSON values, without the texts."""
        states = {"edited": (self.edited_seen, self.edited), "base": (self.base_seen, self.base)}
        return {
            state: {**seen.to_dict(), **{family: measured.to_dict() for family, measured in families.items()}}
            for state, (seen, families) in states.items()
        }


def _figure(share: Share) -> str:
    low, high = share.interval
    return f"{share.value:.2f} ({low:.2f} to {high:.2f})"


@dataclass(frozen=True)
class Observed:
    """Outputs of a model on facts: likelihoods by prompt and answer, and generated texts by prompt."""

    likelihoods: Mapping[Pair, Likelihood]
    texts: Mapping[str, str]


def observe(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    generation: bool = False,
    neighbors: int | None = None,
) -> Observed:
    """Run the model once over everything that the scores of facts need.

    Args:
        generation: Whether to generate texts as well.
        neighbors: Number of neighborhood prompts of each fact, from the first on; None for all.
    """
    pairs = pairs_of(requests, neighbors)
    by_pair = likelihoods(lm, pairs)
    return Observed(dict(zip(pairs, by_pair, strict=True)), _generated(lm, requests) if generation else {})


def observe_with_and_without(
    lm: LanguageModel,
    requests: Sequence[EditRequest],
    start: int,
    without_edits: Callable[[], AbstractContextManager[None]],
    generation: bool = False,
    neighbors: int | None = None,
) -> tuple[Observed, Observed]:
    """Observe the model with its edits and without them. The layers before the edits run only once.

    Args:
        start: First layer with an edit.
        without_edits: Returns a context in which the edits are off.
        generation: Whether to generate texts as well.
        neighbors: Number of neighborhood prompts of each fact, from the first on; None for all.
    """
    pairs = pairs_of(requests, neighbors)
    edited, base = likelihoods_with_and_without(lm, pairs, start, without_edits)
    edited_texts: dict[str, str] = {}
    base_texts: dict[str, str] = {}
    if generation:
        edited_texts = _generated(lm, requests)
        with without_edits():
            base_texts = _generated(lm, requests)
    return (
        Observed(dict(zip(pairs, edited, strict=True)), edited_texts),
        Observed(dict(zip(pairs, base, strict=True)), base_texts),
    )


def pairs_of(requests: Sequence[EditRequest], neighbors: int | None) -> list[Pair]:
    """Return all pairs of prompt and answer that the scores of facts need."""
    pairs: dict[Pair, None] = {}
    for request in requests:
        pairs |= dict.fromkeys([*_edited_pairs(request), *request.locality])
        if request.target_true is not None:
            pairs |= dict.fromkeys(fact_pairs(request, neighbors))
    return list(pairs)


def _generated(lm: LanguageModel, requests: Sequence[EditRequest]) -> dict[str, str]:
    """Return the greedy continuation of each prompt whose answer an edit should give."""
    pairs = list(dict.fromkeys(pair for request in requests for pair in _edited_pairs(request)))
    length = max(len(encode(lm.tokenizer, prompt, answer).target) for prompt, answer in pairs)
    prompts = list(dict.fromkeys(prompt for prompt, _ in pairs))
    texts = sample_continuations(lm, prompts, length + 1, seed=0, top_k=1)
    return {prompt: text.removeprefix(prompt) for prompt, text in zip(prompts, texts, strict=True)}


def measure(
    requests: Sequence[EditRequest], after: Observed, before: Observed, neighbors: int | None = None
) -> dict[str, Measured]:
    """Return the scores of every family that the facts have prompts for.

    Args:
        after: Outputs of the model to score.
        before: Outputs of the base model, for locality.
        neighbors: Number of neighborhood prompts of each fact, from the first on; None for all.
    """
    compared = [request for request in requests if request.target_true is not None]
    families: dict[str, Measured] = {}
    if compared:
        facts = [
            # Accuracy on paraphrases is a token match, another family.
            replace(likelihoods_of_fact(request, after.likelihoods, neighbors), paraphrase_accuracy=())
            for request in compared
        ]
        families["probability"] = with_intervals(probability_scores, facts)
    families["token_match"] = with_intervals(
        token_match_scores, [matches_of(request, after.likelihoods, before.likelihoods) for request in requests]
    )
    if after.texts:
        families["generation"] = with_intervals(
            generation_scores, [_generations(request, after.texts) for request in requests]
        )
    return families


def _edited_pairs(request: EditRequest) -> list[Pair]:
    """Return the prompts that an edit should change, with the new answers."""
    pairs = [(prompt, request.target_new) for prompt in (request.text, *request.paraphrases)]
    return [*pairs, *request.portability]


def matches_of(
    request: EditRequest, after: Mapping[Pair, Likelihood], before: Mapping[Pair, Likelihood]
) -> FactMatches:
    """Return the token matches of one fact, from the likelihoods after and before the edit."""
    shares = [after[pair].accuracy for pair in _edited_pairs(request)]
    split = 1 + len(request.paraphrases)
    return FactMatches(
        rewrite=shares[0],
        rephrase=shares[1:split],
        portability=shares[split:],
        locality=[_share_equal(after[pair].choices, before[pair].choices) for pair in request.locality],
    )


def _share_equal(after: Sequence[int], before: Sequence[int]) -> float:
    return sum(token == old for token, old in zip(after, before, strict=True)) / len(before)


def _generations(request: EditRequest, texts: Mapping[str, str]) -> FactGenerations:
    answered = [says(texts[prompt], answer) for prompt, answer in _edited_pairs(request)]
    split = 1 + len(request.paraphrases)
    return FactGenerations(rewrite=answered[0], rephrase=answered[1:split], portability=answered[split:])
