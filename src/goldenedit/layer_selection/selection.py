"""What every layer selector returns: scores, the layers chosen, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from goldenedit.architecture.hooks import evaluating
from goldenedit.cost import Cost, measuring
from goldenedit.devices import input_device
from goldenedit.editing.rows import context_length, encode
from goldenedit.layer_selection.lga import tukey_filter
from goldenedit.requests import EditRequest


@dataclass(frozen=True)
class LayerSelection:
    """A layer selector's answer.

    Attributes:
        selector: Its name.
        scores: Score of each layer, None where it has none; None for selectors without scores.
        layers: The layers to edit.
        facts: Number of facts that were looked at.
        cost: Seconds and floating-point operations that the scores took when they were computed, without key
            statistics, which are kept for edits too.
        forward_equivalents: The same operations in plain forwards of the model over the facts, each with its new
            answer: what a fact costs, in forwards.
    """

    selector: str
    scores: list[float | None] | None
    layers: list[int]
    facts: int = 0
    cost: Cost = field(default_factory=Cost)
    forward_equivalents: float = 0.0

    def score_tensor(self) -> Tensor:
        """Return the scores, `(num_layers,)` float64, NaN where a layer has none."""
        return score_tensor(self.scores)

    def within_fence(self, kappa: float) -> Tensor:
        """Return which layers may be chosen: with LGA those within the Tukey filter, else those with a score."""
        return tukey_filter(self.score_tensor(), kappa if self.selector == "lga" else math.inf)

    def to_dict(self) -> dict[str, Any]:
        """Return the selection as JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> LayerSelection:
        """Read what `to_dict` returned."""
        return cls(**{**record, "cost": Cost(**record["cost"])})


def score_tensor(scores: Sequence[float | None] | None) -> Tensor:
    """Return scores as JSON has them as a float64 tensor, NaN for None."""
    return torch.tensor([math.nan if score is None else score for score in scores or []], dtype=torch.float64)


@torch.no_grad()
def forward_flops(model: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: Sequence[EditRequest]) -> float:
    """Return the floating-point operations of plain forwards over facts, each with its new answer, one row a fact.

    One of them, of middle length, is run; the others count by their tokens. Where nothing can be counted (see
    `goldenedit.cost`) it is infinity, of which every cost is zero times as much.
    """
    longest = context_length(model.config)
    rows = [encode(tokenizer, fact.text, fact.target_new, max_length=longest).input_ids for fact in facts]
    middle = sorted(rows, key=len)[len(rows) // 2]
    ids = torch.tensor([middle], device=input_device(model))
    with evaluating(model), measuring() as cost:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return cost().flops / len(middle) * sum(map(len, rows)) or math.inf
