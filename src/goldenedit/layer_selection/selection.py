"""What every layer selector returns: scores, the layers chosen, and what it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from goldenedit.cost import Cost, measuring
from goldenedit.editing.rows import context_length, encode
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

    def to_dict(self) -> dict[str, Any]:
        """Return the selection as JSON has it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> LayerSelection:
        """Read what `to_dict` returned."""
        return cls(**{**record, "cost": Cost(**record["cost"])})


@torch.no_grad()
def forward_flops(model: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: Sequence[EditRequest]) -> float:
    """Return the floating-point operations of plain forwards over facts, each with its new answer, one row a fact.

    One of them, of middle length, is run; the others count by their tokens.
    """
    longest = context_length(model.config)
    rows = [encode(tokenizer, fact.text, fact.target_new, max_length=longest).input_ids for fact in facts]
    middle = sorted(rows, key=len)[len(rows) // 2]
    ids = torch.tensor([middle], device=model.get_input_embeddings().weight.device)  # type: ignore[operator]
    with measuring() as cost:
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return cost().flops / len(middle) * sum(map(len, rows))
