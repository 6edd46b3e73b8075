"""What a plain forward costs, the unit in which other work is told."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from goldenedit.architecture.hooks import evaluating
from goldenedit.cost import measuring
from goldenedit.lm.base import TokenizedModel
from goldenedit.lm.tokens import encode
from goldenedit.requests import EditRequest


@torch.no_grad()
def forward_flops(lm: TokenizedModel, facts: Sequence[EditRequest]) -> float:
    """Return the floating-point operations of plain forwards over facts, each with its new answer, one row a fact.

    One of them, of middle length, is run; the others count by their tokens. Where nothing can be counted (see
    `goldenedit.cost`) it is infinity, of which every cost is zero times as much.
    """
    longest = lm.max_length
    rows = [encode(lm.tokenizer, fact.text, fact.target_new, max_length=longest).input_ids for fact in facts]
    middle = sorted(rows, key=len)[len(rows) // 2]
    ids = torch.tensor([middle], device=lm.device)
    with evaluating(lm.model), measuring() as cost:
        lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return cost().flops / len(middle) * sum(map(len, rows)) or math.inf
