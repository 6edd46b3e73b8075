"""The cost of plain forwards, the unit in which the cost of other work is reported."""

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
    """Return the floating-point operations of plain forwards over facts with their new answers, one row per fact.

    Only the row of median length is run; the others are estimated from their numbers of tokens. If operations cannot
    be counted (see `goldenedit.cost`), the result is infinity, so that every cost is 0 in units of it.
    """
    longest = lm.max_length
    rows = [encode(lm.tokenizer, fact.text, fact.target_new, max_length=longest).input_ids for fact in facts]
    median = sorted(rows, key=len)[len(rows) // 2]
    ids = torch.tensor([median], device=lm.device)
    with evaluating(lm.model), measuring() as cost:
        lm.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return cost().flops / len(median) * sum(map(len, rows)) or math.inf
