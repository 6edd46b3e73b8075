"""CounterFact's probability scores as a metric of `evaluate`."""

from typing import Any

import datasets
import evaluate

from goldenedit.evaluation.metrics.rows import by_fact
from goldenedit.evaluation.scores import FactLikelihoods
from goldenedit.evaluation.scores import probability_scores
from goldenedit.evaluation.scores import with_intervals

_DESCRIPTION = """ES, PS, NS and their harmonic mean S: is the new answer more likely than the old? Rows are prompts of
kind `rewrite`, `paraphrase` or `neighborhood`, with the mean NLL of the tokens of both answers."""
_CITATION = "Meng et al. 2022, Locating and Editing Factual Associations in GPT, arXiv:2202.05262, section 3.4"


class Probability(evaluate.Metric):  # type: ignore[misc]
    """ES, PS, NS and S of edited facts, with 95% intervals."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"fact": "int64", "kind": "string", "nll_new": "float64", "nll_old": "float64"}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description="fact, kind, nll_new and nll_old of each prompt",
            features=datasets.Features({name: datasets.Value(kind) for name, kind in features.items()}),
        )

    def _compute(self, fact: list[int], kind: list[str], nll_new: list[float], nll_old: list[float]) -> dict[str, Any]:
        kinds = ("rewrite", "paraphrase", "neighborhood")
        facts = [
            FactLikelihoods(rows["rewrite"][0], rows["paraphrase"], rows["neighborhood"])
            for rows in by_fact(fact, kind, zip(nll_new, nll_old, strict=True), kinds)
        ]
        return with_intervals(probability_scores, facts).to_dict()
