"""Token match of zsRE and KnowEdit as a metric of `evaluate`."""

from typing import Any

import datasets
import evaluate

from goldenedit.evaluation.metrics.rows import by_fact
from goldenedit.evaluation.scores import FactMatches
from goldenedit.evaluation.scores import token_match_scores
from goldenedit.evaluation.scores import with_intervals

_DESCRIPTION = """Share of an answer's tokens that are the model's first choice after the answer's tokens before them.
Rows are prompts of kind `rewrite`, `rephrase`, `portability` or `locality`. The references of a locality prompt are
the first choices before the edit."""
_CITATION = "Zhang et al. 2024, A Comprehensive Study of Knowledge Editing for Large Language Models, arXiv:2401.01286"


class TokenMatch(evaluate.Metric):  # type: ignore[misc]
    """Token match of edited facts, with 95% intervals."""

    def _info(self) -> evaluate.MetricInfo:
        tokens = datasets.Sequence(datasets.Value("int64"))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description="fact and kind of each prompt, the model's first choices, and the expected tokens",
            features=datasets.Features(
                {
                    "fact": datasets.Value("int64"),
                    "kind": datasets.Value("string"),
                    "predictions": tokens,
                    "references": tokens,
                }
            ),
        )

    def _compute(
        self, fact: list[int], kind: list[str], predictions: list[list[int]], references: list[list[int]]
    ) -> dict[str, Any]:
        shares = [
            sum(choice == token for choice, token in zip(choices, tokens, strict=True)) / len(tokens)
            for choices, tokens in zip(predictions, references, strict=True)
        ]
        kinds = ("rewrite", "rephrase", "portability", "locality")
        facts = [
            FactMatches(rows["rewrite"][0], rows["rephrase"], rows["portability"], rows["locality"])
            for rows in by_fact(fact, kind, shares, kinds)
        ]
        return with_intervals(token_match_scores, facts).to_dict()
