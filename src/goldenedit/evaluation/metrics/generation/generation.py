"""Generated answers compared with the expected ones, as a metric of `evaluate`."""

from typing import Any

import datasets
import evaluate

from goldenedit.evaluation.metrics.rows import by_fact
from goldenedit.evaluation.scores import FactGenerations
from goldenedit.evaluation.scores import generation_scores
from goldenedit.evaluation.scores import says
from goldenedit.evaluation.scores import with_intervals

_DESCRIPTION = """Share of prompts whose generated text begins with the expected answer.
Rows are prompts of kind `rewrite`, `rephrase` or `portability`."""
_CITATION = "Yang et al. 2025, The Mirage of Model Editing: Revisiting Evaluation in the Wild, arXiv:2502.11177"


class Generation(evaluate.Metric):  # type: ignore[misc]
    """Share of generated answers that are right, with 95% intervals."""

    def _info(self) -> evaluate.MetricInfo:
        features = ("kind", "predictions", "references")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description="fact and kind of each prompt, its generated text, and the expected answer",
            features=datasets.Features(
                {"fact": datasets.Value("int64"), **{name: datasets.Value("string") for name in features}}
            ),
        )

    def _compute(
        self, fact: list[int], kind: list[str], predictions: list[str], references: list[str]
    ) -> dict[str, Any]:
        answered = [says(text, answer) for text, answer in zip(predictions, references, strict=True)]
        facts = [
            FactGenerations(rows["rewrite"][0], rows["rephrase"], rows["portability"])
            for rows in by_fact(fact, kind, answered, ("rewrite", "rephrase", "portability"))
        ]
        return with_intervals(generation_scores, facts).to_dict()
