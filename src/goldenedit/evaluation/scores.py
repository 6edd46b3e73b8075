"""The probability scores of CounterFact, as pure functions of negative log likelihoods.

Meng et al. 2022 (arXiv 2202.05262), section 3.4. NLLs are means over the answer's tokens, as in their code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class FactLikelihoods:
    """NLLs `(new answer, old answer)` of one edited fact, and token accuracies of the new answer on paraphrases."""

    rewrite: tuple[float, float]
    paraphrases: Sequence[tuple[float, float]]
    neighborhood: Sequence[tuple[float, float]]
    paraphrase_accuracy: Sequence[float] = ()


@dataclass(frozen=True)
class ProbabilityScores:
    """Scores in [0, 1] over `n` facts.

    Attributes:
        efficacy: ES, share of edited prompts where the new answer is likelier than the old.
        paraphrase: PS, the same on paraphrases.
        neighborhood: NS, share of neighbours where the old answer, right for them, is still the likelier.
        score: S, harmonic mean of the three.
        paraphrase_accuracy: Share of the new answer's tokens that are the first choice on paraphrases.
        n: Number of facts.
    """

    efficacy: float
    paraphrase: float
    neighborhood: float
    score: float
    paraphrase_accuracy: float
    n: int


def harmonic_mean(values: Sequence[float]) -> float:
    """Return the harmonic mean; 0 where a value is 0.

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
    """Score edited facts: each fact counts once, whatever the number of its paraphrases and neighbours."""
    if not facts:
        raise ValueError("There are no facts to score.")
    efficacy = fmean(float(new < old) for new, old in (fact.rewrite for fact in facts))
    paraphrase = _mean_of_means([[float(new < old) for new, old in fact.paraphrases] for fact in facts])
    neighborhood = _mean_of_means([[float(old < new) for new, old in fact.neighborhood] for fact in facts])
    return ProbabilityScores(
        efficacy,
        paraphrase,
        neighborhood,
        harmonic_mean([efficacy, paraphrase, neighborhood]),
        _mean_of_means([fact.paraphrase_accuracy for fact in facts]),
        len(facts),
    )


def _mean_of_means(groups: Sequence[Sequence[float]]) -> float:
    means = [fmean(group) for group in groups if group]
    return fmean(means) if means else 0.0
