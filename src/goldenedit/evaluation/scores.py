"""Scores of edits in the three families of the field, as pure functions of a model's outputs.

- *Probability* (CounterFact; Meng et al. 2022, arXiv 2202.05262, section 3.4): is the new answer more likely than the
  old? NLLs are means over the answer's tokens, as in their code.
- *Token match* (zsRE, KnowEdit; Zhang et al. 2024, arXiv 2401.01286): share of the answer's tokens that are the model's
  first choice after the answer's tokens before them; for locality, share of first choices that the edit did not change.
- *Generation*: does the generated text begin with the answer? Teacher forcing overrates editors (arXiv 2502.11177).

Scores of different families cannot be compared. In each family every fact has the same weight, whatever its number of
prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, TypeVar

from goldenedit.evaluation.intervals import Interval, bootstrap, quantile_interval, wilson
from goldenedit.writing import is_unspaced

Fact = TypeVar("Fact")

_FEWEST = 10  # facts that are resampled: the bootstrap of fewer is too narrow


@dataclass(frozen=True)
class FactLikelihoods:
    """NLLs `(new answer, old answer)` on the prompts of one edited fact, and token accuracies on paraphrases."""

    rewrite: tuple[float, float]
    paraphrases: Sequence[tuple[float, float]]
    neighborhood: Sequence[tuple[float, float]]
    paraphrase_accuracy: Sequence[float] = ()


@dataclass(frozen=True)
class ProbabilityScores:
    """Scores in [0, 1] over `n` facts; None if no fact has prompts of the kind.

    Attributes:
        efficacy: ES, share of edited prompts where the new answer is more likely than the old.
        paraphrase: PS, the same on paraphrases.
        neighborhood: NS, share of neighbors where the old answer, which is right there, is still more likely.
        score: S, harmonic mean of the three.
        paraphrase_accuracy: Share of the new answer's tokens that are the first choice on paraphrases.
        n: Number of facts.
    """

    efficacy: float
    paraphrase: float | None
    neighborhood: float | None
    score: float | None
    paraphrase_accuracy: float | None
    n: int


@dataclass(frozen=True)
class FactMatches:
    """Shares of tokens matched on the prompts of one edited fact."""

    rewrite: float
    rephrase: Sequence[float] = ()
    portability: Sequence[float] = ()
    locality: Sequence[float] = ()


@dataclass(frozen=True)
class TokenMatchScores:
    """Token match in [0, 1] over `n` facts; None if no fact has prompts of the kind.

    Attributes:
        rewrite: Share of the new answer's tokens that are the first choice at the edited prompt.
        rephrase: The same on rephrased prompts.
        portability: The same for answers that follow from the new fact.
        locality: Share of first choices on other prompts that the edit did not change.
        n: Number of facts.
    """

    rewrite: float
    rephrase: float | None
    portability: float | None
    locality: float | None
    n: int


@dataclass(frozen=True)
class FactGenerations:
    """Whether the generated texts of one edited fact begin with its answers, by kind of prompt."""

    rewrite: bool
    rephrase: Sequence[bool] = ()
    portability: Sequence[bool] = ()


@dataclass(frozen=True)
class GenerationScores:
    """Share of generated texts that begin with the answer, over `n` facts; None if no fact has such prompts."""

    rewrite: float
    rephrase: float | None
    portability: float | None
    n: int


Scores = ProbabilityScores | TokenMatchScores | GenerationScores


@dataclass(frozen=True)
class Measured:
    """Scores of a family with 95% intervals over facts.

    Attributes:
        scores: The scores.
        intervals: `(low, high)` of each score that is not None, by its name.
    """

    scores: Scores
    intervals: dict[str, Interval] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return scores and intervals as JSON values."""
        return {**asdict(self.scores), "intervals": {name: list(bounds) for name, bounds in self.intervals.items()}}


def harmonic_mean(values: Sequence[float]) -> float:
    """Return the harmonic mean; 0 if a value is 0.

    Example:
        ```python
        >>> round(harmonic_mean([1.0, 1.0, 0.5]), 2)
        0.75
        ```
    """
    if not values or min(values) <= 0:
        return 0.0
    return len(values) / sum(1 / value for value in values)


def probability_scores(facts: Sequence[FactLikelihoods]) -> ProbabilityScores:
    """Return the scores of edited facts by the likelihoods of new and old answer."""
    _check_facts(facts)
    efficacy = fmean(float(new < old) for new, old in (fact.rewrite for fact in facts))
    paraphrase = _mean_of_means([[float(new < old) for new, old in fact.paraphrases] for fact in facts])
    neighborhood = _mean_of_means([[float(old < new) for new, old in fact.neighborhood] for fact in facts])
    score = None
    if paraphrase is not None and neighborhood is not None:
        score = harmonic_mean([efficacy, paraphrase, neighborhood])
    return ProbabilityScores(
        efficacy=efficacy,
        paraphrase=paraphrase,
        neighborhood=neighborhood,
        score=score,
        paraphrase_accuracy=_mean_of_means([fact.paraphrase_accuracy for fact in facts]),
        n=len(facts),
    )


def token_match_scores(facts: Sequence[FactMatches]) -> TokenMatchScores:
    """Return the scores of edited facts by the tokens that are the model's first choice."""
    _check_facts(facts)
    return TokenMatchScores(
        rewrite=fmean(fact.rewrite for fact in facts),
        rephrase=_mean_of_means([fact.rephrase for fact in facts]),
        portability=_mean_of_means([fact.portability for fact in facts]),
        locality=_mean_of_means([fact.locality for fact in facts]),
        n=len(facts),
    )


def generation_scores(facts: Sequence[FactGenerations]) -> GenerationScores:
    """Return the scores of edited facts by the generated texts."""
    _check_facts(facts)
    return GenerationScores(
        rewrite=fmean(fact.rewrite for fact in facts),
        rephrase=_mean_of_means([fact.rephrase for fact in facts]),
        portability=_mean_of_means([fact.portability for fact in facts]),
        n=len(facts),
    )


def says(text: str, answer: str) -> bool:
    """Return whether a text begins with an answer, ignoring case and leading spaces.

    Example:
        ```python
        >>> says(" rome, the capital", "Rome"), says("It is in Rome", "Rome"), says(" Romeo", "Rome")
        (True, False, False)
        ```
    """
    text, answer = text.strip().casefold(), answer.strip().casefold()
    following = text[len(answer) : len(answer) + 1]
    return text.startswith(answer) and (not following.isalnum() or is_unspaced(following))


def with_intervals(
    score: Callable[[Sequence[Fact]], Scores], facts: Sequence[Fact], resamples: int = 1000, seed: int = 0
) -> Measured:
    """Return the scores of facts with 95% intervals over facts.

    An interval is bootstrapped if at least 10 facts have prompts of the kind and the resamples differ. Otherwise it is
    Wilson's, because the bootstrap of one success of one says that it is certain. Wilson's interval is for shares and
    means. For `score`, which is a harmonic mean, it is an approximation.

    Args:
        score: One of the functions above. Its scores are in [0, 1].
        facts: Facts, which are resampled with replacement.
        resamples: Number of resamples.
        seed: Seed of the resampling.
    """
    scores = score(facts)
    by_fact = [asdict(score([fact])) for fact in facts]
    values = {name: value for name, value in asdict(scores).items() if name != "n" and value is not None}
    # Facts without prompts of a kind say nothing about its score. A harmonic mean may be of parts from different facts.
    counts = {name: max(sum(alone[name] is not None for alone in by_fact), 1) for name in values}
    resampled = []
    if any(count >= _FEWEST for count in counts.values()):
        resampled = bootstrap(lambda draw: asdict(score(draw)), facts, resamples, seed)
    intervals = {}
    for name, value in values.items():
        drawn = [by_name[name] for by_name in resampled if by_name[name] is not None]
        is_wilson = counts[name] < _FEWEST or not drawn or max(drawn) - min(drawn) < 1e-9
        intervals[name] = wilson(value, counts[name]) if is_wilson else quantile_interval(drawn)
    return Measured(scores, intervals)


def _check_facts(facts: Sequence[object]) -> None:
    if not facts:
        raise ValueError("There are no facts to score. Pass at least one.")


def _mean_of_means(groups: Sequence[Sequence[float]]) -> float | None:
    means = [fmean(group) for group in groups if group]
    return fmean(means) if means else None
