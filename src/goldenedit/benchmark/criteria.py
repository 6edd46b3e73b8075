"""By what a layer is called golden: what a user sees, KnowEdit's metrics, or S; with intervals over facts.

Scores of facts are tensors `(..., facts, parts)`, with NaN for a part that a fact has no prompts for. A part's score is
the mean over facts, and a criterion the harmonic or the plain mean over its parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import torch
from torch import Tensor

from goldenedit.evaluation.intervals import Interval
from goldenedit.evaluation.scores import probability_scores, token_match_scores
from goldenedit.layer_selection import Outcome

RESAMPLES = 1000
_ZERO = 1e-9  # harmonic means with a part that is zero are below this


@dataclass(frozen=True)
class Criterion:
    """A way to score edits.

    Attributes:
        name: Its name in reports.
        help: What it is.
        parts: Returns the parts of one fact's outcome, NaN for those without prompts.
        is_harmonic: Whether its score is the harmonic mean of its parts.
    """

    name: str
    help: str
    parts: Callable[[Outcome], list[float]]
    is_harmonic: bool

    def of(self, outcomes: Sequence[Outcome]) -> Tensor:
        """Return the parts of facts, `(facts, parts)`."""
        return torch.tensor([self.parts(outcome) for outcome in outcomes], dtype=torch.float64)

    def score(self, parts: Tensor) -> Tensor:
        """Return the score of facts, `(...)` for `(..., facts, parts)`; NaN without any prompts."""
        means = parts.nanmean(-2)
        if not self.is_harmonic:
            return means.nanmean(-1)
        known = ~means.isnan()
        inverse = (1 / means.clamp(min=1e-12)).masked_fill(~known, 0.0).sum(-1)
        return known.sum(-1) / inverse

    def of_facts(self, parts: Tensor) -> Tensor:
        """Return a score of each fact, `(..., facts)`: the mean of its parts.

        The harmonic mean of a single fact would mostly be 0.
        """
        return parts.nanmean(-1)


def _seen(outcome: Outcome) -> list[float]:
    if outcome.sight is None:
        return [math.nan, math.nan]
    return [fmean(outcome.sight.says.values()), fmean(outcome.sight.unchanged.values())]


def _knowedit(outcome: Outcome) -> list[float]:
    found = token_match_scores([outcome.matches])
    return [_or_nan(value) for value in (found.rewrite, found.rephrase, found.portability, found.locality)]


def _s(outcome: Outcome) -> list[float]:
    if outcome.likelihoods is not None:
        scores = probability_scores([outcome.likelihoods])
        return [_or_nan(value) for value in (scores.efficacy, scores.paraphrase, scores.neighborhood)]
    found = token_match_scores([outcome.matches])
    return [_or_nan(value) for value in (found.rewrite, found.rephrase, found.locality)]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


CRITERIA = {
    "seen": Criterion(
        "seen",
        "what a user sees: harmonic mean of how often the fact is said, over its forms, and how often other prompts "
        "are continued as by the base model",
        _seen,
        True,
    ),
    "knowedit": Criterion(
        "knowedit",
        "KnowEdit's overall: mean of token match on rewrite, rephrase, portability and locality",
        _knowedit,
        False,
    ),
    "S": Criterion(
        "S",
        "harmonic mean of ES, PS and NS for facts with neighbors, or of token match on rewrite, rephrase and locality",
        _s,
        True,
    ),
}


@dataclass(frozen=True)
class LayerCurve:
    """One editor on the facts of one dataset, by one criterion, at some layers.

    Attributes:
        criterion: The criterion.
        layers: The layers.
        parts: `(layers, facts, parts)`.
    """

    criterion: Criterion
    layers: Sequence[int]
    parts: Tensor

    @classmethod
    def of(cls, criterion: Criterion, outcomes: Mapping[int, Sequence[Outcome]]) -> LayerCurve | None:
        """Return the curve of outcomes by layer; None if they lack what the criterion needs."""
        layers = sorted(outcomes)
        parts = torch.stack([criterion.of(outcomes[layer]) for layer in layers])
        return None if parts.isnan().all() else cls(criterion, layers, parts)

    @property
    def facts(self) -> int:
        """Number of facts."""
        return self.parts.shape[1]

    @property
    def scores(self) -> Tensor:
        """Score of each layer, `(layers,)`."""
        return self.criterion.score(self.parts)

    @property
    def best(self) -> int:
        """The layer with the highest score."""
        return self.layers[int(self.scores.argmax())]

    @cached_property
    def resampled(self) -> Tensor:
        """The scores of all layers on facts drawn with replacement, `(resamples, layers)`."""
        drawn = draws(self.facts)
        return torch.stack([self.criterion.score(of_layer[drawn]) for of_layer in self.parts], 1)

    def intervals(self) -> list[Interval]:
        """Return the 95% interval of each layer's score."""
        return [quantiles(of_layer) for of_layer in self.resampled.T]

    def plateau(self) -> list[int]:
        """Return the layers that cannot be told from the best one.

        The 95% interval of the difference from it, over the same facts, reaches 0.
        """
        lost = self.resampled - self.resampled[:, [self.layers.index(self.best)]]
        return [layer for layer, of_layer in zip(self.layers, lost.T, strict=True) if quantiles(of_layer)[1] >= 0]

    def lost_at(self, layer: int) -> tuple[float, Interval]:
        """Return what is lost at a layer relative to the best one, `1 - score / best score`, and its interval.

        The interval is that of the difference between these two layers. That the best one was chosen on the same facts
        is what `held_out` tells.
        """
        return self._lost(self.parts[self.layers.index(layer)], self.best)

    @cached_property
    def held_out(self) -> tuple[float, Interval]:
        """What is lost if each fact is edited at the layer that is best for the others, and its interval.

        This is what choosing the best layer costs by chance: no selector that reads other facts can be expected to lose
        less. The interval is over the facts, whose layers stay as they are.
        """
        every = torch.arange(self.facts)
        chosen = [
            self.criterion.score(self.parts[:, every != fact]).argmax() if self.facts > 1 else self.scores.argmax()
            for fact in every
        ]
        return self._lost(self.parts[torch.stack(chosen), every], self.best)

    def per_fact(self) -> tuple[float, Interval]:
        """Return the score if each fact is edited at its own best layer, and its interval. Luck is part of it."""
        parts = self.parts[self._own_layers(), torch.arange(self.facts)]
        return self.criterion.score(parts).item(), quantiles(self.criterion.score(parts[draws(self.facts)]))

    def chosen_by(self, other: LayerCurve) -> tuple[float, Interval]:
        """Return what is lost if each fact is edited at its own best layer by another criterion, and its interval.

        It is relative to the best fixed layer by that criterion. Below 0, a layer of its own for each fact is better.
        """
        return self._lost(self.parts[other._own_layers(), torch.arange(self.facts)], other.best)

    def _own_layers(self) -> Tensor:
        """Return the place of the best layer of each fact; of equally good ones, the one that is best for all facts."""
        ties = 1e-6 * self.scores.nan_to_num(0)[:, None]
        return (self.criterion.of_facts(self.parts).nan_to_num(-1) + ties).argmax(0)

    def _lost(self, parts: Tensor, layer: int) -> tuple[float, Interval]:
        """Return what facts with these parts lose relative to a layer, and its interval."""
        at_layer, drawn = self.parts[self.layers.index(layer)], draws(self.facts)
        return (
            _loss(self.criterion.score(parts), self.criterion.score(at_layer)).item(),
            quantiles(_loss(self.criterion.score(parts[drawn]), self.criterion.score(at_layer[drawn]))),
        )


def _loss(scores: Tensor, best: Tensor) -> Tensor:
    """Return `1 - scores / best`; 0 where the best score is 0, so that nothing can be lost."""
    return torch.where(best > _ZERO, 1 - scores / best.clamp(min=_ZERO), 0.0)


def draws(facts: int) -> Tensor:
    """Return indices of facts that are drawn with replacement, `(resamples, facts)`, always the same."""
    return torch.randint(facts, (RESAMPLES, facts), generator=torch.Generator().manual_seed(0))


def quantiles(values: Tensor) -> Interval:
    """Return the 95% interval of bootstrap values."""
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, with mean ranks for ties; None if one side is constant.

    Example:
        ```python
        >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
        0.5
        ```
    """
    a, b = _ranks(first), _ranks(second)
    mean = fmean(a)
    spread = sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)
    if spread == 0:
        return None
    return float(sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True)) / spread**0.5)


def _ranks(values: Sequence[float]) -> list[float]:
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
